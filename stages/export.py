"""`dflash export`: a checkpoint as a folder that the clients load unchanged, checked by their rules beforehand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dflash_offline.schemas.draft.checksums import CARD, CHECKSUMS, checksums_bytes
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.config_rules import read_document
from dflash_offline.schemas.draft.formats import FORMATS, ZLAB, config_json, tensor_name
from dflash_offline.schemas.draft.lint import RECORD, lint_draft
from dflash_offline.schemas.draft.rules import ONE_CLIENTS_LIMIT, DraftFault
from dflash_offline.schemas.draft.values import is_int
from dflash_offline.schemas.draft.weights import read_header
from dflash_offline.schemas.errors import DflashError, MismatchError, dflash_line
from dflash_offline.schemas.evaluation import read_result
from dflash_offline.schemas.files import publish, sha256_file, sync_folder, write_synced
from dflash_offline.schemas.locks import building_folder, remove_unfinished
from dflash_offline.schemas.manifest import TARGET
from dflash_offline.schemas.paths import output_folder
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.settings.option import choice_problem
from dflash_offline.stages.draft.weights import check_draft_weights, draft_state_dict, load_draft, save_weights
from dflash_offline.stages.export_card import card, converted_card
from dflash_offline.stages.target.files import target_folder
from dflash_offline.stages.training.checkpoint import (
    WEIGHTS,
    choose_checkpoint,
    read_state,
    training_record,
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` left."""

    draft: Path
    step: int | None
    """Of its training; None of a draft that does not say it."""
    num_parameters: int
    num_bytes: int
    kind: str
    """One of `FORMATS`."""
    target: str
    """As the cache was extracted with."""
    cache: Path | None
    """The first that it was trained from; None of a draft folder, which does not say where that lies."""

    def next_line(self, out: Path) -> str:
        """Return what to do next with the draft that the user calls `out`: measure it, if it can be done from here."""
        if self.kind == ZLAB and self.cache is not None and self.cache.is_dir():
            source = ("--target", self.target, "--cache", self.cache, "--limit", 20)
            return f"Next: {dflash_line('eval', out, *source)}"
        return f"Next: serve it as {out / CARD} says."


def export(run: Path, out: Path, which: str = "best", kind: str = ZLAB, evaluation: Path | None = None) -> Exported:
    """Write the draft folder whole: config.json, model.safetensors in bfloat16, the card, checksums.json.

    `kind` is one of `FORMATS`, `evaluation` a result of `dflash eval` for the card; without one, `run`/eval.json is
    taken if it is of this checkpoint. Raises `DflashError`, and leaves nothing, if the folder would break a client's
    rule. The same checkpoint exported again to the same folder changes nothing but the card and its checksum; a folder
    that holds anything else is refused.
    """
    if problem := choice_problem("The format", kind, FORMATS):
        raise DflashError(problem)
    out = output_folder(out, marker="config.json", kind="draft", renamed=True)
    record = RunRecord.read(run)
    checkpoint = choose_checkpoint(run, which)
    state = read_state(checkpoint)
    config = DraftConfig.read(checkpoint)
    weights = load_file(checkpoint / WEIGHTS)
    check_draft_weights(weights, config, str(checkpoint))
    trained = training_record(record, state.step)
    result = _evaluation(run, evaluation, trained, config.num_draft_tokens)
    target = _target_config(record)
    architectures = record.origin.get("target_architectures") or (target or {}).get("architectures") or []
    document = config_json(config, kind, record.origin["target"], architectures)
    said = json.dumps(trained, sort_keys=True)
    with building_folder(out) as temporary:
        files = _write_served(temporary, weights, said, document, kind)
        limits = _refuse_faulty(lint_draft(temporary, target), checkpoint)
        _write_card(temporary, files, card(record, config, state, kind, result, limits))
        _publish(temporary, out)
    return Exported(
        draft=out,
        step=state.step,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        num_bytes=(out / WEIGHTS).stat().st_size,
        kind=kind,
        target=record.origin["target"],
        cache=Path(record.origin["caches"][0]),
    )


def export_draft(folder: Path, out: Path, kind: str, target: str | None) -> Exported:
    """Write a draft folder, ours or another's, in one of `FORMATS`: what `export` writes, but for the card.

    `folder` is of the plain format; what its weights say of their training goes with them. `target` is the model that
    it drafts for, which only its card and the speculators format name. Raises `DflashError` as `export` does.
    """
    if problem := choice_problem("The format", kind, FORMATS):
        raise DflashError(problem)
    if target is None:
        raise DflashError(f"{folder} is a draft, and does not say where its target lies. Name it by --target.")
    out = output_folder(out, marker="config.json", kind="draft", renamed=True)
    config = DraftConfig.read(folder)
    weights = draft_state_dict(load_draft(folder), config)
    _, metadata = read_header(folder / WEIGHTS)
    place = target_folder(target, None)
    model = read_document(place)
    if isinstance(model, str):
        raise DflashError(f"{place}/config.json {model}. Name the target's folder or hub id by --target.")
    document = config_json(config, kind, target, model.get("architectures") or [])
    with building_folder(out) as temporary:
        files = _write_served(temporary, weights, metadata.get(RECORD), document, kind)
        limits = _refuse_faulty(lint_draft(temporary, model), folder)
        _write_card(temporary, files, converted_card(folder.resolve().name, config, kind, target, limits))
        _publish(temporary, out)
    return Exported(
        draft=out,
        step=_step(metadata.get(RECORD)),
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        num_bytes=(out / WEIGHTS).stat().st_size,
        kind=kind,
        target=target,
        cache=None,
    )


def _step(record: str | None) -> int | None:
    """Return the step in what a weight file says of its training."""
    try:
        step = json.loads(record or "{}")["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if is_int(step, 0) else None


def _write_served(
    temporary: Path, weights: dict[str, torch.Tensor], trained: str | None, document: dict[str, Any], kind: str
) -> dict[str, str]:
    """Write the weights, halved and named as the format does, and config.json; returns their sha256 by name."""
    halved = {tensor_name(name, kind): w.to(torch.bfloat16).contiguous() for name, w in weights.items()}
    metadata = {"format": "pt", **({} if trained is None else {RECORD: trained})}
    text = json.dumps(document, indent=2) + "\n"
    return {
        WEIGHTS: save_weights(temporary / WEIGHTS, halved, metadata),
        "config.json": write_synced(temporary / "config.json", [text.encode()]),
    }


def _write_card(temporary: Path, files: dict[str, str], text: str) -> None:
    """Write the card, and the checksums of all files."""
    files = {**files, CARD: write_synced(temporary / CARD, [text.encode()])}
    write_synced(temporary / CHECKSUMS, [checksums_bytes(files)])


def _refuse_faulty(faults: list[DraftFault], checkpoint: Path) -> list[str]:
    """Raise `DflashError` naming every fault; returns those that are only one client's limit."""
    limits = [f for f in faults if f.rule in ONE_CLIENTS_LIMIT]
    refused = [
        f"{f.place} {f.what} ({', '.join(f.breaks) or 'older readers'}: {f.why})" for f in faults if f not in limits
    ]
    if refused:
        listed = "\n  ".join(refused)
        raise DflashError(
            f"The draft of {checkpoint} would not be served as it was trained, and was not written:\n  {listed}\n"
            f"Export another checkpoint, or train again."
        )
    return [f"{', '.join(f.breaks)}: {f.why}." for f in limits]


def _evaluation(run: Path, path: Path | None, trained: dict[str, Any], num_draft_tokens: int) -> dict[str, Any] | None:
    """Return the result of `dflash eval` for this checkpoint; one that was asked for must be of it."""
    given = path if path is not None else run / "eval.json"
    if path is None and not given.is_file():
        return None
    result = read_result(given, "Name a result of `dflash eval --save`.")
    measured = result["trained"]
    if any((measured or {}).get(name) != trained[name] for name in ("run", "step")):
        if path is None:
            return None
        raise MismatchError(
            f"{given} was measured with another draft: {measured}; expected run {trained['run']}, step "
            f"{trained['step']}. Evaluate this checkpoint, or leave --eval out."
        )
    for one in (result.get("draft_lengths") or {}).get("expected", ()):
        if one["num_speculative_tokens"] > num_draft_tokens:
            raise MismatchError(
                f"{given} advises to draft {one['num_speculative_tokens']} tokens; expected at most the block's "
                f"{num_draft_tokens}. Evaluate this checkpoint again, or leave --eval out."
            )
    return result


def _target_config(record: RunRecord) -> dict[str, Any] | None:
    """Return the target's config.json as the cache keeps it, if the cache is still where it was."""
    path = Path(record.origin["caches"][0]) / TARGET / "config.json"
    if not path.is_file() or sha256_file(path) != record.origin["target_identity"]["config_sha256"]:
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _publish(temporary: Path, out: Path) -> None:
    if (out / "config.json").is_file():
        if not _same_draft(temporary, out):
            raise DflashError(f"{out} exists and holds something else than this draft. Name a new --out.")
        for name in (CARD, CHECKSUMS):
            remove_unfinished(out / name)
        publish([(temporary / CARD).read_bytes()], path=out / CARD)
        files = {name: sha256_file(out / name) for name in (WEIGHTS, "config.json", CARD)}  # older headers differ
        publish([checksums_bytes(files)], path=out / CHECKSUMS)
        return
    sync_folder(temporary)
    temporary.rename(out)
    sync_folder(out.parent)


def _same_draft(one: Path, other: Path) -> bool:
    """Say whether two folders hold the same config and weights; older versions wrote metadata in any order."""
    if (one / "config.json").read_bytes() != (other / "config.json").read_bytes():
        return False
    try:
        (ours, said), (theirs, said_there) = (read_header(folder / WEIGHTS) for folder in (one, other))
    except ValueError:
        return False
    if said != said_there or ours.keys() != theirs.keys():
        return False
    left, right = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)
