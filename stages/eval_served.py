"""`dflash eval --server`: a live server measured, beside what is decoded here where a target is named."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from dflash_offline.schemas.evaluation import Counted, Difference, EvalResult, Served, Service, spread
from dflash_offline.schemas.results.rounds import Acceptance, Rounds, round_figures
from dflash_offline.schemas.secrets import KEY_VARIABLE, Secrets, shown_url
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.answers.exchange import Client
from dflash_offline.stages.conversations.prompts import read_prompts
from dflash_offline.stages.conversations.reading.public_sets import describe_set
from dflash_offline.stages.draft.losslessness import compare_answers, first_difference
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluate import evaluate, load, machine
from dflash_offline.stages.evaluation.draft_lengths import advise, walk_lengths
from dflash_offline.stages.evaluation.samples import as_prompts, check_cache_fits, choose_samples, draft_folder
from dflash_offline.stages.evaluation.served_costs import costs_of, round_seconds, saved_costs, step_seconds
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.serving.measure import LiveServer, Pass, Question, measure
from dflash_offline.stages.serving.stream import StreamedAnswer


@dataclass(frozen=True)
class _Reference:
    """What a served answer is compared with."""

    text: str | None
    ids: list[int] | None
    prompt_ids: list[int] | None
    """The prompt's tokens as they are here."""


def evaluate_served(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Return what a live server does with the prompts, at each concurrency asked for.

    With a target the result is that of `evaluate`, and the server's figures stand beside it; without one they are all
    there is, and nothing but the draft's config is read here. Raises `DflashError` if a prompt gets no answer.
    """
    assert config.server is not None, "the settings were checked"
    progress, loaded, local, lengths = progress or Silent(), None, None, None
    folder, trained = draft_folder(config.draft)
    draft, saved = load_draft(folder), saved_costs(config, trained)
    if config.target is not None:
        loaded = load(config, progress)
        local = evaluate(replace(config, keep_rounds=True), **vars(loaded), progress=progress)
    held_out = None
    if config.cache is not None:
        samples = choose_samples(config.cache, trained, config.limit)
        check_cache_fits(samples, draft)
        questions, held_out = [Question(prompt=p, ids=ids) for p, ids in as_prompts(samples)], samples.held_out
        if config.draft_lengths and local is None:
            lengths = advise(walk_lengths(samples, draft, progress)[1], (), saved, config)
    else:
        assert config.prompts is not None, "the settings were checked"
        prompts = loaded.prompts if loaded is not None else None
        prompts = prompts or read_prompts(config.prompts, config.limit, config.seed)
        questions = [Question(prompt=prompt) for prompt in prompts]
        if local is not None:
            assert local.decoded is not None, "they were asked for"
            questions = [replace(q, ids=list(d.prompt_ids)) for q, d in zip(questions, local.decoded, strict=True)]
    lengths = local.draft_lengths if local is not None else lengths
    server, passes, plain = asyncio.run(_ask(config, questions, progress))
    references = _references(questions, local, plain)
    target = loaded.target if loaded else None
    served = tuple(
        _served(config, questions, one, plain[i] if plain else None, references, target, number)
        for i, (one, number) in enumerate(zip(passes, config.concurrency, strict=True))
    )
    service = Service(
        url=shown_url(config.server),
        kind=server.kind,
        model=server.model,
        compared_with=None if config.temperature else _compared_with(plain, local),
        num_speculative_tokens=server.num_speculative_tokens,
        passes=served,
        notes=(*server.notes, *_notes(served, server, draft.config.num_draft_tokens), *_unasked(questions)),
    )
    if local is not None:
        found = replace(local, decoded=local.decoded if config.keep_rounds else None)
    else:
        found = _of_the_server(
            config, questions, passes[0], served[0], trained, held_out, draft.config.num_draft_tokens
        )
    if lengths is not None:
        lengths = advise(lengths.lengths, lengths.costs, [*saved, *costs_of(service)], config)
    return replace(
        found,
        config=replace(config, server=service.url, plain_server=config.plain_server and shown_url(config.plain_server)),
        service=service,
        draft_lengths=lengths,
        lossless=_lossless(found.lossless, served),
    )


def _compared_with(plain: list[Pass] | None, local: EvalResult | None) -> str | None:
    if plain:
        return "the plain server"
    return "the target here" if local else None


async def _ask(
    config: EvalConfig, questions: list[Question], progress: Progress
) -> tuple[LiveServer, list[Pass], list[Pass] | None]:
    """Return the server and its passes, and the plain server's, if there is one."""
    assert config.server is not None
    urls = [url for url in (config.server, config.plain_server) if url is not None]
    secrets = Secrets(os.environ.get(KEY_VARIABLE) or None, urls)
    async with Client(secrets, concurrency=max(config.concurrency), timeout_s=config.timeout_s) as client:
        servers = [await LiveServer.meet(client, url, config, questions[0]) for url in urls]
        passes = [await measure(server, questions, config.concurrency, progress) for server in servers]
    return servers[0], passes[0], passes[1] if len(passes) > 1 else None


def _references(
    questions: list[Question], local: EvalResult | None, plain: list[Pass] | None
) -> list[_Reference] | None:
    """Return each prompt's right answer: the plain server's, else the target's here; None without either."""
    ids = [question.ids for question in questions]
    if plain is not None:
        return [_Reference(a.text, a.ids or None, own) for a, own in zip(plain[0].answers, ids, strict=True)]
    if local is None or local.decoded is None:
        return None
    return [_Reference(None, list(one.answer), own) for one, own in zip(local.decoded, ids, strict=True)]


def _served(
    config: EvalConfig,
    questions: list[Question],
    one: Pass,
    plain: Pass | None,
    references: list[_Reference] | None,
    target: Any,
    concurrency: int,
) -> Served:
    timed = [(a, a.first, a.last, a.num_tokens or 0) for a in one.answers]
    own_prompts = [(question.ids, a.prompt_ids) for question, a in zip(questions, one.answers, strict=True)]
    compared = False
    differences: tuple[Difference, ...] = ()
    if references is not None and not config.temperature:
        places = [question.prompt.place for question in questions]
        pairs = list(zip(places, one.answers, references, strict=True))
        compared = all(r.text is not None or a.ids for _, a, r in pairs)
        if compared:
            found = [_difference(place, answer, right, target) for place, answer, right in pairs]
            differences = tuple(difference for difference in found if difference is not None)
    rounds = _rounds(questions, one.answers)
    kinds = round_figures(rounds, max(_longest(rounds), 2))["acceptance_by_kind"] if rounds else {}
    return Served(
        concurrency=concurrency,
        prompts=len(one.answers),
        tokens=one.num_tokens,
        seconds=one.seconds,
        tokens_per_s=one.num_tokens / one.seconds,
        first_token_s=spread([first - a.began for a, first, _, _ in timed if first is not None]),
        per_token_s=spread([(last - first) / (n - 1) for _, first, last, n in timed if first and last and n > 1]),
        counted=one.counted,
        round_s=round_seconds(one, concurrency),
        plain_step_s=step_seconds(plain, concurrency) if plain else None,
        acceptance_by_kind=kinds,
        plain_tokens_per_s=plain.num_tokens / plain.seconds if plain else None,
        identical=len(one.answers) - len(differences) if compared else None,
        differences=differences,
        other_prompts=sum(bool(ours and theirs and ours != theirs) for ours, theirs in own_prompts),
    )


def _difference(place: str, answer: StreamedAnswer, right: _Reference, target: Any) -> Difference | None:
    """Return where an answer leaves the right one; with a target here, also whether rounding explains it."""
    if answer.ids and right.ids:
        if target is not None and right.prompt_ids:
            return compare_answers(target, place, right.prompt_ids, right.ids, answer.ids)
        ours: Sequence[Any] = answer.ids
        theirs: Sequence[Any] = right.ids
    else:
        ours, theirs = answer.text, right.text or ""
    at = first_difference(theirs, ours)
    if at is None:
        return None
    tokens = [found[at] if answer.ids and right.ids and at < len(found) else None for found in (theirs, ours)]
    return Difference(
        prompt=place,
        position=at,
        plain_token=tokens[0],
        speculative_token=tokens[1],
        gap=None,
        tolerance=None,
        tie=False,
    )


def _rounds(questions: list[Question], answers: list[StreamedAnswer]) -> list[Rounds] | None:
    """Return the rounds of every answer, where the server tells them; cut at each answer's end."""
    found = []
    for question, answer in zip(questions, answers, strict=True):
        if answer.rounds is None and (answer.num_tokens or 0) > 1:
            return None
        drafted, accepted = answer.rounds or ([], [])
        left, produced = (answer.num_tokens or 1) - 1, []
        for number in accepted:
            produced.append(min(number + 1, left))
            left -= produced[-1]
        kept = [min(pair) for pair in zip(accepted, produced, strict=True)]
        found.append(Rounds(kind=question.prompt.kind, produced=produced, proposed=drafted, kept=kept))
    return found


def _longest(rounds: list[Rounds]) -> int:
    return 1 + max((number for one in rounds for number in one.proposed), default=0)


def _of_the_server(
    config: EvalConfig,
    questions: list[Question],
    one: Pass,
    served: Served,
    trained: dict[str, Any] | None,
    held_out: bool | None,
    num_draft_tokens: int,
) -> EvalResult:
    """Return a result whose figures are all a server's."""
    rounds = _rounds(questions, one.answers)
    figures = round_figures(rounds, _longest(rounds)) if rounds else _counted_figures(one, num_draft_tokens)
    ours = machine(torch.device("cpu"), torch.float32)
    return EvalResult(
        config=config,
        trained=trained,
        offline=False,
        held_out=held_out,
        prompt_set=describe_set(config.prompts) if config.prompts is not None else None,
        **figures,
        identical=served.identical,
        differences=served.differences,
        **(ours | {"device": "the server", "dtype": "the server's", "threads": 0}),
    )


def _counted_figures(one: Pass, num_draft_tokens: int) -> dict[str, Any]:
    """Return the fields of a result that follow from a server's counters; of one that has none, nothing was counted."""
    counted = one.counted or Counted(acceptance_length=None)
    rounds, by_slot = counted.rounds or 0, counted.accepted_by_slot or (0,) * num_draft_tokens
    reached = (rounds, *by_slot, 0)
    return {
        "block_size": len(by_slot) + 1,
        "acceptance": Acceptance(
            prompts=len(one.answers),
            rounds=rounds,
            tokens=rounds + (counted.accepted or 0),
            pooled=counted.acceptance_length,
            mean=None,
        ),
        "acceptance_by_kind": {},
        "rounds_by_tokens": tuple(here - further for here, further in pairwise(reached)),
        "drafted_by_slot": (rounds,) * len(by_slot),
        "accepted_by_slot": by_slot,
        "drafted_tokens": counted.drafted or 0,
        "accepted_tokens": counted.accepted or 0,
    }


def _notes(served: tuple[Served, ...], server: LiveServer, num_draft_tokens: int) -> list[str]:
    """Return what a reader must know before believing the figures."""
    found = []
    for one in served:
        at = f"at {one.concurrency} at a time"
        if one.counted is None:
            found.append(f"{at} the server showed no counters that are known here: its acceptance is not known")
        elif one.counted.is_disturbed:
            found.append(
                f"{at} the server also had {one.counted.other_requests} requests and {one.counted.other_tokens} tokens "
                f"of others: what it counted is not of these prompts alone. Measure when nobody else uses it"
            )
        if one.counted is not None and one.counted.since_start:
            found.append(f"{at} the acceptance length is the server's average since it was started")
        if one.other_prompts:
            found.append(
                f"{at} the server's chat template made other tokens of {one.other_prompts} prompts than the target's "
                f"here: give both the same template and --chat-template-kwargs"
            )
    drafts = server.num_speculative_tokens
    if drafts is not None and drafts != num_draft_tokens:
        found.append(f"the server drafts {drafts} tokens a round, and the draft was trained for {num_draft_tokens}")
    if server.kind == "vLLM" and drafts is None:
        found.append("the server counts no drafts: it was started without --speculative-config")
    return list(dict.fromkeys(found))


def _unasked(questions: list[Question]) -> list[str]:
    """Return a note on the turns that were not asked, since they stand behind answers that nothing here gives."""
    later = sum(len(question.prompt.then) for question in questions)
    if not later:
        return []
    return [f"{later} later turns were not asked: they follow the target's answers. Name --target to ask them too"]


def _lossless(here: bool | None, served: tuple[Served, ...]) -> bool | None:
    """Say whether no answer is changed, here and by the server; None where nothing says that rounding was not it."""
    found = [d for one in served for d in one.differences if not d.tie]
    if here is False or any(d.gap is not None for d in found):
        return False
    if found:
        return None
    return True if here or any(one.identical is not None for one in served) else None
