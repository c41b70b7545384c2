"""`dflash eval --html`: an evaluation as a page, with every round of every prompt, and where the draft fails most."""

from collections import Counter
from pathlib import Path
from typing import Any

from dflash_offline.pipeline.commands.length_report import advice, length_rows
from dflash_offline.pipeline.commands.served_report import HEADINGS, served_rows
from dflash_offline.pipeline.pages.page import fitting, write_page
from dflash_offline.pipeline.pages.plots import Plot, Series, draw, require_matplotlib
from dflash_offline.pipeline.token_text import Decode, token_texts, visible
from dflash_offline.schemas.evaluation import NOT_LOSSLESS, PROPOSALS, DecodedPrompt, EvalResult, Served

MOST_BYTES = 6 << 20
"""Of the prompts' rounds on a page; further prompts are left out, and the page says so."""
MOST_CONFUSIONS = 100
PROMPT_CHARACTERS = 4000
"""Shown of a prompt: its end, where the answer begins."""


def write_eval_page(result: EvalResult, path: Path, decode: Decode | None = None) -> None:
    """Write the page; `decode` makes text of token ids, and is needed where prompts were decoded."""
    require_matplotlib()
    config, decoded = result.config, result.decoded or ()
    shown = fitting((_prompt(prompt, decode) for prompt in decoded), MOST_BYTES) if decode else []
    note = f"{len(shown):,} prompts."
    if len(shown) < len(decoded):
        note = f"The first {len(shown):,} of {len(decoded):,} prompts; the others would make the page too large."
    if result.offline:
        note = "No prompt was decoded: the cache was walked without a target. Name one with --target to see rounds."
    elif not decode:
        note = "No prompt was decoded here: the figures are the server's. Name its target with --target to see rounds."
    confusions = _confusions(decoded, decode) if decode else []
    write_page(
        path,
        "eval.html",
        ("browse.js", "eval.js"),
        title=f"Draft {Path(config.draft).resolve().name}, evaluated",
        lead=_lead(result),
        warnings=_warnings(result),
        facts=_facts(result),
        plots=[draw(plot) for plot in _plots(result)],
        kinds=_kinds(result),
        proposals=_proposals(result),
        lengths=_lengths(result),
        service=_service(result),
        confusions=confusions[:MOST_CONFUSIONS],
        confusions_note=f"First rejected token of each round, over all prompts; {_listed(len(confusions))}.",
        prompts=shown,
        prompts_note=note,
    )


def _lead(result: EvalResult) -> str:
    config = result.config
    if result.offline:
        return f"{config.draft} against {config.cache}, serving walk over cached answers"
    against = " and ".join(str(name) for name in (config.target, config.server) if name)
    return f"{config.draft} against {against}, prompts of {result.prompts_shown}"


def _service(result: EvalResult) -> dict[str, Any] | None:
    """Return what a live server did, as tables."""
    if result.service is None:
        return None
    rows = [[int(row[0]), *row[1:]] for row in served_rows(result)]
    return {
        "lead": f"{result.service.kind} at {result.service.url}, model {result.service.model}",
        "headings": HEADINGS,
        "rows": rows,
    }


def _kinds(result: EvalResult) -> list[list[Any]]:
    """Return the acceptance of each kind of prompts, the worst first."""
    kinds = sorted(result.acceptance_by_kind.items(), key=lambda pair: pair[1].pooled or 0)
    return [[visible(kind), group.prompts, group.rounds, group.pooled, group.mean] for kind, group in kinds]


def _lengths(result: EvalResult) -> dict[str, Any] | None:
    """Return what each number of drafted tokens gives and costs, and how many to draft."""
    found = result.draft_lengths
    if found is None:
        return None
    headings, rows = length_rows(found)
    lines = [line.strip() for one in found.expected for line in advice(one)] + [*found.notes]
    return {"headings": [visible(one) for one in headings], "rows": rows, "lines": [visible(line) for line in lines]}


def _proposals(result: EvalResult) -> list[list[Any]]:
    """Return what each way of drafting gave, where tokens were drawn."""
    return [
        [
            *(PROPOSALS[one.name], one.acceptance.pooled, one.acceptance.mean, one.accepted_tokens, one.drafted_tokens),
            *(one.tokens_per_s, one.speedup),
        ]
        for one in result.proposals
    ]


def _listed(number: int) -> str:
    if number <= MOST_CONFUSIONS:
        return f"{number:,} pairs, the most frequent first"
    return f"the {MOST_CONFUSIONS} most frequent of {number:,} pairs"


def _warnings(result: EvalResult) -> list[str]:
    lines = [f"{note}." for note in result.service.notes] if result.service else []
    if result.lossless is False:
        lines.append(NOT_LOSSLESS)
    if result.acceptance.pooled is not None and result.acceptance.pooled < 1.2:
        lines.append(f"acceptance length {result.acceptance.pooled:.2f}: nearly every drafted token is rejected.")
    return lines


def _facts(result: EvalResult) -> list[tuple[str, Any]]:
    """Return the results that have a value, named as on the terminal."""
    acceptance = result.acceptance
    facts: list[tuple[str, Any]] = [
        ("acceptance length, pooled", acceptance.pooled),
        ("acceptance length, mean of prompts", acceptance.mean),
        ("most it could be (block size)", result.block_size),
        ("turns" if result.offline else "prompts", acceptance.prompts),
        ("rounds", acceptance.rounds),
        ("drafted tokens", result.drafted_tokens),
        ("accepted tokens", result.accepted_tokens),
        ("tokens per target call", result.tokens_per_call),
        ("with prompt lookup", result.prompt_lookup_tokens_per_call),
        ("tokens/s, target alone", result.plain_tokens_per_s),
        ("tokens/s, with the draft", result.speculative_tokens_per_s),
        ("times as fast", result.speedup),
        ("answers identical to the target's", result.identical),
    ]
    facts += [
        (f"expected acceptance length at temperature {one.temperature:g}, without a target", one.pooled)
        for one in result.expected
    ]
    return [(name, value) for name, value in facts if value is not None]


def _plots(result: EvalResult) -> list[Plot]:
    slots = list(range(1, result.block_size))
    shares = result.slot_shares()
    rounds = max(result.acceptance.rounds, 1)
    served = [one for one in (result.service.passes if result.service else ()) if one.counted and one.counted.rounds]
    by_tokens = [number / rounds for number in result.rounds_by_tokens]
    return [
        Plot(
            title="Acceptance by slot",
            note="In the answer: of all drafted. If those before are: what the slot itself gets right.",
            x_label="slot",
            y_label="share",
            kind="bar",
            y_range=(0, 1),
            series=[
                Series(name="in the answer", x=slots, y=[share for share, _ in shares]),
                Series(name="if those before are", x=slots, y=[alone for _, alone in shares], colour=1),
                *(_served_series(one, 2 + i) for i, one in enumerate(served if result.config.target else ())),
            ],
        ),
        Plot(
            title="Tokens of a round",
            note="A round gives at least the target's own token and at most a whole block.",
            x_label="tokens",
            y_label="share of rounds",
            kind="bar",
            series=[Series(name="rounds", x=range(1, result.block_size + 1), y=by_tokens, colour=2)],
        ),
    ]


def _served_series(one: Served, colour: int) -> Series:
    """Return what a server accepted of each slot, of all its rounds."""
    assert one.counted is not None and one.counted.rounds
    by_slot = one.counted.accepted_by_slot or ()
    shares = [number / one.counted.rounds for number in by_slot]
    return Series(name=f"served, {one.concurrency} at once", x=range(1, len(by_slot) + 1), y=shares, colour=colour)


def _prompt(prompt: DecodedPrompt, decode: Decode) -> dict[str, Any]:
    """Return a prompt as the page's script reads it; every text is what its token adds where it stands."""
    texts = [visible(text) for text in token_texts(prompt.answer, decode, prompt.prompt_ids)]
    rounds, at = [], 1
    for drafted, accepted, produced in zip(prompt.drafted, prompt.accepted, prompt.produced, strict=True):
        before = [*prompt.prompt_ids[-4:], *prompt.answer[:at], *drafted[:accepted]]
        lost = [visible(text) for text in token_texts(drafted[accepted:], decode, before)]
        own = at + accepted if produced > accepted else None
        rounds.append(
            {
                "texts": texts[at : at + accepted] + lost,
                "ids": drafted,
                "accepted": accepted,
                "own": None if own is None else texts[own],
                "own_id": None if own is None else prompt.answer[own],
            }
        )
        at += produced
    proposed, kept = sum(map(len, prompt.drafted)), sum(prompt.accepted)
    return {
        "place": visible(prompt.prompt.rsplit("/", 1)[-1]),
        "kind": None if prompt.kind is None else visible(prompt.kind),
        "text": visible(decode(list(prompt.prompt_ids))[-PROMPT_CHARACTERS:]),
        "first": texts[0] if texts else "",
        "first_id": prompt.answer[0] if prompt.answer else None,
        "tokens": len(prompt.answer),
        "rounds": rounds,
        "acceptance": sum(prompt.produced) / len(prompt.produced) if prompt.produced else None,
        "accepted_share": kept / proposed if proposed else None,
        "identical": prompt.identical,
    }


def _confusions(decoded: tuple[DecodedPrompt, ...], decode: Decode) -> list[list[Any]]:
    """Return (first rejected token, the target's own instead, times), the most frequent first."""
    pairs: Counter[tuple[int, int]] = Counter()
    for prompt in decoded:
        at = 1
        for drafted, accepted, produced in zip(prompt.drafted, prompt.accepted, prompt.produced, strict=True):
            if accepted < len(drafted) and produced > accepted:
                pairs[drafted[accepted], prompt.answer[at + accepted]] += 1
            at += produced
    return [[_quoted(a, decode), _quoted(b, decode), times] for (a, b), times in pairs.most_common()]


def _quoted(token: int, decode: Decode) -> str:
    return f"“{visible(decode([token]))}” ({token})"
