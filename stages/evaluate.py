"""`dflash eval`: decode prompts with and without the draft, or walk a cache, and report what the rounds gave."""

import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.schemas.evaluation import DecodedPrompt, EvalResult, ProposalFigures
from dflash_offline.schemas.results.draft_lengths import DraftLengths, ServedCost
from dflash_offline.schemas.results.rounds import round_figures
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt, read_prompts
from dflash_offline.stages.conversations.reading.public_sets import describe_set
from dflash_offline.stages.draft.losslessness import compare_answers
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.pairing import check_draft_fits, check_rewindable
from dflash_offline.stages.draft.sampling import Proposal
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluation.costs import measure_costs
from dflash_offline.stages.evaluation.decoding import Case, Decoder, Outcome, rounds_of, tokens_per_s
from dflash_offline.stages.evaluation.draft_lengths import advise, decode_lengths, walk_lengths
from dflash_offline.stages.evaluation.samples import (
    as_prompts,
    check_cache_fits,
    choose_samples,
    draft_folder,
    walk_samples,
)
from dflash_offline.stages.evaluation.served_costs import saved_costs
from dflash_offline.stages.evaluation.turns import all_turns, stop_ids
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.target.files import open_target, steady_positions
from dflash_offline.stages.target.model import check_plain_embeddings, choose_device, load_model, resolve_dtype


@dataclass(frozen=True)
class Loaded:
    """What an evaluation with a target decodes with."""

    target: Any
    tokenizer: Any
    draft: DraftModel
    trained: dict[str, Any] | None
    prompts: list[Prompt] | None
    """Those that the settings name, with their later turns; None where a cache is."""


def load(config: EvalConfig, progress: Progress | None = None) -> Loaded:
    """Return the target and the draft that the settings name, loaded."""
    assert config.target is not None, "there is a target to load"
    files = open_target(config.target, revision=config.revision, trust_remote_code=config.trust_remote_code)
    device = choose_device(config.device)
    dtype = resolve_dtype(config.dtype, device, files.config)
    folder, trained = draft_folder(config.draft)
    draft = load_draft(folder, dtype, device)
    prompts = None
    if config.prompts is not None:  # a faulty file is named before the target's weights are read
        prompts = read_prompts(config.prompts, config.limit, config.seed)
    target = load_model(
        files,
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    check_plain_embeddings(target, files.name)
    if prompts is not None:
        prompts = all_turns(prompts, config, target, files.tokenizer, progress or Silent())
    return Loaded(target, files.tokenizer, draft, trained, prompts)


def evaluate_folder(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Load what the settings name, and return what `evaluate`, or without a target `evaluate_offline`, finds."""
    if config.target is None:
        return evaluate_offline(config, progress)
    return evaluate(config, **vars(load(config, progress)), progress=progress)


def evaluate_offline(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Return the serving walk of the draft over the cache's held-out samples; no target is loaded.

    Where the cached answers are the target's own greedy ones, it is what live decoding gives, but for the rounding of
    cached features. Where the cache has the target's final states it is also expected of drawn tokens.
    """
    assert config.cache is not None, "the settings were checked"
    device = choose_device(config.device)
    folder, trained = draft_folder(config.draft)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    draft = load_draft(folder, dtype, device)
    samples = choose_samples(config.cache, trained, config.limit)
    check_cache_fits(samples, draft)
    with _torch_threads(config.threads):
        progress, lengths, saved = progress or Silent(), None, saved_costs(config, trained)
        if config.draft_lengths:
            walk, lengths = walk_lengths(samples, draft, progress)
        else:
            (walk,) = walk_samples(samples, [draft], progress)
        return EvalResult(
            config=config,
            trained=trained,
            offline=True,
            held_out=samples.held_out,
            **round_figures(walk.rounds, 1 + draft.config.num_draft_tokens),
            expected=walk.expected,
            draft_lengths=advise(lengths, (), saved, config) if lengths else None,
            **machine(device, dtype),
        )


def evaluate(
    config: EvalConfig,
    *,
    target: Any,
    tokenizer: Any,
    draft: DraftModel,
    trained: dict[str, Any] | None = None,
    prompts: list[Prompt] | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Decode every prompt by the target alone and with the draft, and return what that shows.

    `target` is a transformers causal language model and `draft` a DFlash draft, both loaded with the device and dtype
    that the settings ask for. The ways take turns at going first, after one prompt that is not counted. Where tokens
    are drawn, the draft's are proposed in both ways, and the figures are those of the greedy one.
    """
    check_draft_fits(draft.config, target)
    if config.confidence_threshold is not None and not draft.config.variant.has_confidence:
        raise DflashError(
            f"--confidence-threshold is {config.confidence_threshold}, and {config.draft} is a draft of the variant "
            f"{draft.config.variant.name}, which foretells no acceptance. Leave it out."
        )
    check_rewindable(target, config.target or type(target).__name__)
    progress = progress or Silent()
    if prompts is None and config.prompts is not None:
        prompts = all_turns(
            read_prompts(config.prompts, config.limit, config.seed), config, target, tokenizer, progress
        )
    cases, held_out = _cases(config, tokenizer, target, draft, trained, prompts)
    decoder, saved = Decoder(config, target, draft, stop_ids(target, tokenizer)), saved_costs(config, trained)
    outcomes: list[Outcome] = []
    with _torch_threads(config.threads):
        progress.start("Decoding", len(cases), "prompts")
        try:
            decoder.warm_up(cases[0])
            for i, case in enumerate(cases):
                outcomes.append(decoder.outcome(case, i))
                produced = [n for o in outcomes for n in o.speculative.produced]
                progress.advance(1, acceptance=sum(produced) / max(len(produced), 1))
        finally:
            progress.finish()
        return EvalResult(
            config=config,
            trained=trained,
            offline=False,
            held_out=held_out,
            prompt_set=describe_set(config.prompts) if config.prompts is not None else None,
            **round_figures([rounds_of(o.case, o.speculative) for o in outcomes], 1 + draft.config.num_draft_tokens),
            **_live_figures(config, target, outcomes),
            draft_lengths=_draft_lengths(decoder, outcomes, saved, progress) if config.draft_lengths else None,
            proposals=tuple(
                _proposal(name, outcomes, 1 + draft.config.num_draft_tokens)
                for name in decoder.proposals
                if config.temperature
            ),
            decoded=tuple(_decoded(config, o) for o in outcomes) if config.keep_rounds else None,
            **machine(target.device, target.dtype),
        )


def _draft_lengths(
    decoder: Decoder, outcomes: list[Outcome], saved: list[ServedCost], progress: Progress
) -> DraftLengths:
    """Return what shorter blocks give on the prompts, and what to draft by the costs of the steps here."""
    lengths = decode_lengths(decoder, outcomes, progress)
    texts = sorted((o.case.ids + o.plain.tokens[: len(o.plain.tokens) // 2] for o in outcomes), key=len)
    fresh = round(lengths[-1].acceptance.pooled or 1)
    costs = measure_costs(
        decoder.target, decoder.draft, texts[len(texts) // 2], fresh, decoder.config.concurrency, progress
    )
    return advise(lengths, costs, saved, decoder.config)


def token_decoder(config: EvalConfig) -> Callable[[list[int]], str]:
    """Return what makes text of the target's token ids, special tokens written out."""
    assert config.target is not None, "only a target's answers are decoded"
    files = open_target(config.target, revision=config.revision, trust_remote_code=config.trust_remote_code)

    def decode(ids: list[int]) -> str:
        text: str = files.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode


def _cases(
    config: EvalConfig,
    tokenizer: Any,
    target: Any,
    draft: DraftModel,
    trained: dict[str, Any] | None,
    prompts: list[Prompt] | None,
) -> tuple[list[Case], bool | None]:
    held_out = None
    if config.cache is not None:
        samples = choose_samples(config.cache, trained, config.limit)
        check_cache_fits(samples, draft)
        cases, held_out = [Case(*pair) for pair in as_prompts(samples)], samples.held_out
    else:
        assert prompts is not None, "the settings were checked"
        cases = [Case(prompt, encode_prompt(prompt, tokenizer, config.chat_template_kwargs)) for prompt in prompts]
    most = steady_positions(target.config.get_text_config(decoder=True))
    for case in cases:
        if most is not None and len(case.ids) + config.max_new_tokens > most:
            raise BadInputError(
                f"{case.prompt.place} is {len(case.ids)} tokens long; with {config.max_new_tokens} more it exceeds the "
                f"target's {most} positions. Shorten the prompt, or ask for fewer tokens with --max-new-tokens."
            )
    return cases, held_out


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _live_figures(config: EvalConfig, target: Any, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the fields of a result that need the target."""
    log_probs = [value for o in outcomes for value in o.plain.log_probs]
    tokens = sum(len(o.speculative.tokens) for o in outcomes)
    calls = sum(1 + len(o.speculative.produced) for o in outcomes)
    plain, speculative = tokens_per_s(o.plain for o in outcomes), tokens_per_s(o.speculative for o in outcomes)
    ratios = [ratio for o in outcomes if (ratio := _speedup(o)) is not None]
    lookups = [o.lookup for o in outcomes if o.lookup is not None]
    figures = {
        "tokens_per_call": tokens / calls,
        "prompt_lookup_tokens_per_call": (
            sum(len(o.tokens) for o in lookups) / sum(o.target_calls for o in lookups) if lookups else None
        ),
        "plain_tokens_per_s": plain,
        "speculative_tokens_per_s": speculative,
        "speedup": speculative / plain if plain and speculative else None,
        "speedup_median": statistics.median(ratios) if ratios else None,
        "nll": -statistics.fmean(log_probs),
    }
    if config.temperature:
        return figures
    found = [
        compare_answers(target, o.case.prompt.place, o.case.ids, o.plain.tokens, o.speculative.tokens) for o in outcomes
    ]
    differences = [difference for difference in found if difference is not None]
    return figures | {
        "identical": len(outcomes) - len(differences),
        "differences": tuple(differences),
        "lossless": all(d.tie for d in differences),
    }


def _proposal(name: Proposal, outcomes: list[Outcome], block_size: int) -> ProposalFigures:
    """Return what one way of proposing tokens gave."""
    done = [(o.case, o.by_proposal[name]) for o in outcomes]
    plain, speed = tokens_per_s(o.plain for o in outcomes), tokens_per_s(decoded for _, decoded in done)
    figures = round_figures([rounds_of(*pair) for pair in done], block_size)
    return ProposalFigures(
        name=name,
        tokens_per_s=speed,
        speedup=speed / plain if plain and speed else None,
        **{
            field: figures[field] for field in ("acceptance", "acceptance_by_kind", "drafted_tokens", "accepted_tokens")
        },
    )


def _decoded(config: EvalConfig, outcome: Outcome) -> DecodedPrompt:
    done = outcome.speculative
    return DecodedPrompt(
        prompt=outcome.case.prompt.place,
        kind=outcome.case.prompt.kind,
        prompt_ids=tuple(outcome.case.ids),
        answer=tuple(done.tokens),
        drafted=tuple(map(tuple, done.blocks or ())),
        accepted=tuple(done.kept),
        produced=tuple(done.produced),
        identical=None if config.temperature else done.tokens == outcome.plain.tokens,
    )


def _speedup(outcome: Outcome) -> float | None:
    plain, speculative = tokens_per_s([outcome.plain]), tokens_per_s([outcome.speculative])
    return speculative / plain if plain and speculative else None


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of a result that say what it was measured on."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "dflash-offline")},
        },
    }
