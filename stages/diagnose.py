"""`dflash diagnose`: what a server accepted beside the draft run offline, with one thing changed at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.stages.conversations.prompts import Prompt, read_prompts
from dflash_offline.stages.evaluation.diagnosis import changes
from dflash_offline.stages.evaluation.diagnosis.changes import Change, possible_changes
from dflash_offline.stages.evaluation.diagnosis.findings import (
    EACH_PROMPT,
    EXPLAINED,
    HEALTHY,
    OTHER_PROMPTS,
    SAME_PROMPTS,
    UNEXPLAINED,
    Cause,
    Diagnosis,
    Rates,
    Tried,
)
from dflash_offline.stages.evaluation.diagnosis.known_text import KnownText
from dflash_offline.stages.evaluation.diagnosis.likelihood import (
    Counts,
    Verdict,
    deviance,
    is_systematic,
    judge_other_prompts,
    judge_prompt_by_prompt,
    judge_same_prompts,
)
from dflash_offline.stages.evaluation.diagnosis.remedies import remedies
from dflash_offline.stages.evaluation.diagnosis.served_profile import (
    ServedProfile,
    ask_server,
    saved_profile,
    typed_profile,
)
from dflash_offline.stages.evaluation.diagnosis.trials import (
    Bench,
    Trial,
    answer_all,
    load_target,
    open_bench,
    other_dtype,
    renamed,
    run_trial,
)
from dflash_offline.stages.evaluation.turns import stop_ids
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.serving.measure import Question
from dflash_offline.stages.target.files import open_target

_MOST_FOREIGN = 0.05
"""Share of the answers that may have a token which the target would not choose; a server's kernels differ a little."""


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is to be explained, and over which answers."""

    served: ServedProfile | None
    scope: str | None
    prompts: tuple[Prompt, ...] = ()
    """Those that were served, where they are known; else the held-out samples' are."""
    max_new_tokens: int | None = None
    """Of one answer, where it is not the settings'."""


def diagnose(config: DiagnoseConfig, progress: Progress | None = None) -> Diagnosis:
    """Return what explains the acceptance that a server has with a draft, if a change to the offline run does.

    Where nothing is served, it is what each change would give. Raises `DflashError` if what was served cannot be known,
    or the cache or the target is not the draft's.
    """
    bench = open_bench(config, progress or Silent())
    case = _what_was_served(bench)
    trials = _run_trials(bench, case)
    tried = [change for trial in trials for change in trial.changes]
    walked = [counts for trial in trials for counts in trial.counts]
    verdict = None if case.served is None else _judge(case, case.served, tried, walked)
    causes = () if case.served is None or verdict is None else _causes(bench, case, case.served, trials, tried, verdict)
    outcome = None
    if verdict is not None:
        outcome = EXPLAINED if causes else UNEXPLAINED if verdict.differs else HEALTHY
    served = case.served
    rows = [
        _row(case, change, counts, verdict, i) for i, (change, counts) in enumerate(zip(tried, walked, strict=True))
    ]
    return Diagnosis(
        config=config,
        source=served.source if served else None,
        client=served.client if served else None,
        scope=case.scope,
        texts=len(walked[0]),
        held_out=bench.samples.held_out,
        served=None if served is None else Rates(length=served.length, shares=served.shares, rounds=served.rounds),
        tried=tuple(rows),
        outcome=outcome,
        causes=causes,
        not_tried=tuple(dict.fromkeys(bench.not_tried)),
        notes=(*_notes(case), *_better_offline(trials[0], outcome)),
    )


def _what_was_served(bench: Bench) -> _Case:
    config = bench.config
    prompts = tuple(read_prompts(config.prompts, config.limit)) if config.prompts else ()
    if config.server is not None:
        return _asked(bench, prompts)
    if config.served is None:
        return _Case(served=None, scope=None)
    path = Path(config.served)
    if not path.is_file():
        served = typed_profile(config.served, config.served_rounds)
        if len(served.shares) > bench.draft.num_draft_tokens:
            served = replace(served, block_size=len(served.shares) + 1)
        return _Case(served=served, scope=SAME_PROMPTS if prompts else OTHER_PROMPTS, prompts=prompts)
    if config.served_rounds is not None:
        raise DflashError(
            f"--served-rounds is {config.served_rounds}, and --served is the file {path}, which holds its rounds; "
            f"expected --served-rounds with shares alone. Leave it out."
        )
    served, result = saved_profile(path)
    settings = result.get("config", {})
    if not prompts and settings.get("prompts") and bench.files is not None:
        prompts = tuple(read_prompts(Path(settings["prompts"]), settings.get("limit"), settings.get("seed", 0)))
    of_cache = str(settings.get("cache")) == str(config.cache)
    num = len(prompts) or (len(bench.cached_texts) if of_cache else 0)
    is_same = bool(result) and bench.files is not None and num == result["acceptance"]["prompts"]
    return _Case(
        served=served,
        scope=SAME_PROMPTS if is_same else OTHER_PROMPTS,
        prompts=prompts,
        max_new_tokens=settings.get("max_new_tokens"),
    )


def _asked(bench: Bench, prompts: tuple[Prompt, ...]) -> _Case:
    """Ask the server for the answers to prompts, else to those of the held-out samples, by their tokens."""
    if bench.files is None:
        raise DflashError(
            f"A server's answers are walked with the target run again, and {bench.not_tried[0]}. Name the target by "
            f"--target, or give the server's acceptance by --served."
        )
    if prompts:
        ids = bench.rendered(prompts)
        questions = [Question(prompt=p, ids=None if p.messages else own) for p, own in zip(prompts, ids, strict=True)]
    else:
        texts = bench.cached_texts[: bench.config.limit]
        ids = [text.ids[: text.first] for text in texts]
        questions = [
            Question(prompt=Prompt(place=text.place, text=""), ids=own) for text, own in zip(texts, ids, strict=True)
        ]
    served = ask_server(bench.config, questions, ids, bench.progress)
    scope = EACH_PROMPT if served.each is not None else OTHER_PROMPTS
    return _Case(served=served, scope=scope, prompts=prompts)


def _run_trials(bench: Bench, case: _Case) -> list[Trial]:
    """Return the draft run under every change, as it was trained first."""
    drafted = case.served.block_size - 1 if case.served and case.served.block_size else None
    own = possible_changes(bench.draft, drafted, bench.text_config(), bench.special_ids())
    if bench.files is None:
        return [run_trial(bench, None, bench.cached_texts, own)]
    model = load_target(bench, bench.files, bench.dtype)
    stops = stop_ids(model, bench.files.tokenizer)
    prompts = _prompts(bench, case)
    known = _known_texts(bench, case)
    most = case.max_new_tokens or bench.config.max_new_tokens
    trials = [run_trial(bench, model, known or answer_all(bench, model, prompts, stops, most), own)]
    if case.scope == SAME_PROMPTS and case.prompts:
        for title, ids in bench.other_renderings(case.prompts).items():
            rendered = [(prompt.place, one) for prompt, one in zip(case.prompts, ids, strict=True)]
            texts = answer_all(bench, model, rendered, stops, most)
            trials.append(run_trial(bench, model, texts, [renamed(own[0], changes.TEMPLATE, title)]))
    del model
    dtype = other_dtype(bench.dtype)
    others = [(bench.files, dtype, changes.DTYPE, f"target and draft in {str(dtype).removeprefix('torch.')}")]
    if name := bench.config.other_target:
        files = open_target(name, trust_remote_code=bench.config.trust_remote_code)
        others.append((files, bench.dtype, changes.TARGET, f"{name} as the target"))
    for files, dtype, cause, title in others:
        model = load_target(bench, files, dtype)
        is_known = bool(known) and (cause == changes.DTYPE or case.scope == EACH_PROMPT)
        texts = known if is_known else answer_all(bench, model, prompts, stops, most)
        trials.append(run_trial(bench, model, texts, [renamed(own[0], cause, title)]))
        del model
    return trials


def _known_texts(bench: Bench, case: _Case) -> list[KnownText]:
    """Return the answers to walk, where they need not be decoded first."""
    if case.scope == EACH_PROMPT:
        assert case.served is not None
        return list(case.served.texts)
    return [] if case.scope == SAME_PROMPTS else bench.cached_texts


def _prompts(bench: Bench, case: _Case) -> list[tuple[str, list[int]]]:
    """Return the place and the tokens of each prompt."""
    if case.scope == SAME_PROMPTS and case.prompts:
        return [(p.place, ids) for p, ids in zip(case.prompts, bench.rendered(case.prompts), strict=True)]
    return [(text.place, text.ids[: text.first]) for text in bench.cached_texts]


def _comparable(served: ServedProfile, counts: Counts) -> Counts:
    """Return counts [P, 1 + slots] as those served are known: by as many slots, or by what was accepted altogether."""
    if served.shares:
        missing = max(0, 1 + len(served.shares) - counts.shape[1])
        return np.pad(counts, ((0, 0), (0, missing)))[:, : 1 + len(served.shares)]
    return np.stack((counts[:, 0] * served.tries_a_round, counts[:, 1:].sum(axis=1)), axis=1)


def _judge(case: _Case, served: ServedProfile, tried: Sequence[Change], walked: Sequence[Counts]) -> Verdict:
    compared = [_comparable(served, counts) for counts in walked]
    if case.scope == EACH_PROMPT:
        assert served.each is not None
        rounded = [one for change, one in zip(tried, compared, strict=True) if _is_rounding(change)]
        return judge_prompt_by_prompt(served.each, compared, rounded[0] if rounded else None)
    counts = served.counts(int(walked[0][:, 0].sum()))
    if case.scope == OTHER_PROMPTS:
        return judge_other_prompts(counts, compared)
    totals = [one.sum(axis=0) for one in compared]
    noise = [deviance(total, totals[0]) for change, total in zip(tried, totals, strict=True) if _is_rounding(change)]
    return judge_same_prompts(counts, compared, max(noise, default=0.0))


def _is_rounding(change: Change) -> bool:
    return change.cause == changes.DTYPE


def _causes(
    bench: Bench, case: _Case, served: ServedProfile, trials: Sequence[Trial], tried: Sequence[Change], verdict: Verdict
) -> tuple[Cause, ...]:
    """Return what was found: what the server itself shows, then what the changes show."""
    found: dict[str, tuple[list[str], str]] = {}
    size = 1 + bench.draft.num_draft_tokens
    if served.block_size is not None and served.block_size != size:
        title = f"blocks of {served.block_size}"
        found[changes.BLOCK] = (
            [title],
            f"the server drafts {served.block_size - 1} tokens a round, trained are {size - 1}",
        )
    if case.prompts and served.other_prompts:
        titles = [title for title, ids in bench.other_renderings(case.prompts).items() if _are_served(served, ids)]
        what = f"the server's template makes other tokens of {served.other_prompts} of {len(served.texts)} prompts"
        found[changes.TEMPLATE] = titles or ["another template"], what
    if case.scope == EACH_PROMPT and (what := _of_another_target(trials[0], len(served.texts), verdict)):
        found[changes.TARGET] = ["other weights, a quantized target, or drawn answers"], what
    for cause in dict.fromkeys(tried[i].cause for i in verdict.named):
        titles = [tried[i].title for i in verdict.named if tried[i].cause == cause]
        more = f"; {found[cause][1]}" if cause in found else ""
        found[cause] = titles, _EVIDENCE[str(case.scope)] + more
    kwargs = json.dumps(bench.template_kwargs)
    return tuple(
        Cause(
            cause=cause,
            titles=tuple(titles),
            evidence=evidence,
            remedies=remedies(cause, bench.draft, bench.target_name, kwargs),
        )
        for cause, (titles, evidence) in found.items()
    )


def _of_another_target(trial: Trial, num_texts: int, verdict: Verdict) -> str:
    """Return what speaks for answers of another target; nothing where nothing does."""
    if trial.foreign > _MOST_FOREIGN * num_texts:
        return f"{trial.foreign} of {num_texts} answers have a token that the target would not choose, rounding aside"
    if verdict.differs and not verdict.named and trial.inexact > _MOST_FOREIGN * num_texts:
        return (
            f"no change gives the served rounds, they are further from the draft's than rounding is, and "
            f"{trial.inexact} of {num_texts} answers have a token that is not the target's own"
        )
    return ""


_EVIDENCE = {
    EACH_PROMPT: "offline it gives the served rounds, prompt by prompt",
    SAME_PROMPTS: "offline it gives the served counts over the same prompts",
    OTHER_PROMPTS: "offline it gives the served profile on other prompts, as nearly as so many rounds can tell",
}


def _are_served(served: ServedProfile, ids: Sequence[list[int]]) -> bool:
    """Say whether the server made these tokens of its prompts; `ids` has an entry for each text, or for more."""
    known = {tuple(one) for one in ids}
    return all(tuple(text.ids[: text.first]) in known for text in served.texts)


def _row(case: _Case, change: Change, counts: Counts, verdict: Verdict | None, index: int) -> Tried:
    rounds, *by_slot = (float(number) for number in counts.sum(axis=0))
    same = None
    if case.served is not None and case.served.each is not None:
        same = int((_comparable(case.served, counts) == case.served.each).all(axis=1).sum())
    return Tried(
        cause=change.cause,
        title=change.title,
        rates=Rates(
            length=1 + sum(by_slot) / max(rounds, 1),
            shares=tuple(number / max(rounds, 1) for number in by_slot[: change.config.num_draft_tokens]),
            rounds=int(rounds),
        ),
        misfit=None if verdict is None else verdict.scores[index],
        same_prompts=same,
    )


def _better_offline(trial: Trial, outcome: str | None) -> list[str]:
    """Return a note for each change that makes the draft better, which only a draft that is run wrongly can be."""
    if outcome in (EXPLAINED, UNEXPLAINED):
        return []
    rounds, *others = (counts[:, 0] for counts in trial.counts)
    better = [
        change.title
        for change, other in zip(trial.changes[1:], others, strict=True)
        if change.cause in _RUN_WRONGLY and is_systematic(rounds - other) and (rounds - other).sum() > 0
    ]
    what = "offline the draft accepts more with {}: see that its config.json is as it was trained (`dflash verify`)"
    return [what.format(title) for title in better]


_RUN_WRONGLY = (changes.LAYERS, changes.CAUSALITY, changes.MASK_TOKEN, changes.ROTARY, changes.WINDOW)


def _notes(case: _Case) -> tuple[str, ...]:
    """Return what a reader must know before believing the diagnosis."""
    served, found = case.served, list[str]()
    if served is None:
        return ()
    found += served.notes
    if case.scope == OTHER_PROMPTS:
        found.append(
            "the served prompts are not the walked ones, so that a small loss, or a mistake of small effect, cannot be "
            "told from other prompts: --server, or --served with the --prompts that were served, can"
        )
    if not served.shares:
        found.append("the acceptance length alone is known, which many mistakes explain equally well")
    if case.scope == EACH_PROMPT and not case.prompts:
        found.append("the server was given tokens; --prompts shows whether it renders messages as the cache was made")
    return tuple(found)
