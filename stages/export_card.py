"""The README.md of an exported draft: what it is, how it was made, what was measured, and how each server runs it."""

import shlex
from typing import Any

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.formats import ZLAB
from dflash_offline.schemas.draft.rules import SPECULATORS
from dflash_offline.schemas.evaluation import PROPOSALS
from dflash_offline.schemas.run import RunRecord
from dflash_offline.stages.training.checkpoint import TrainState

_RECIPE = (
    *("steps", "epochs", "weights", "batch_tokens", "row_tokens", "batch_size", "accumulation_times_ranks"),
    *("optimizer", "learning_rate", "warmup_ratio", "weight_decay", "clip", "ema", "num_anchors", "anchors"),
    *("loss", "teacher_temperature", "gamma", "seed", "dtype"),
)
"""Settings that decide a run, in the order in which the card lists those that it has."""

_ZLAB = """A block holds {holds}; vLLM counts the drafted ones, SGLang {counts}.
{advice}
    vllm serve {quoted} --speculative-config \\
      '{{"method": "{method}", "model": "THIS_FOLDER", "num_speculative_tokens": {drafted}}}'

    python -m sglang.launch_server --model-path {quoted} --speculative-algorithm {algorithm} \\
      --speculative-draft-model-path THIS_FOLDER --speculative-num-draft-tokens {block}
"""
_SPECULATORS = """The speculators format. Its layer ids are {aux}, one more than those above: entries of
transformers' hidden states, of which entry 0 is the embedding. Embeddings and head are the target's own.
{advice}
    vllm serve {quoted} --speculative-config \\
      '{{"method": "{method}", "model": "THIS_FOLDER", "num_speculative_tokens": {drafted}}}'

SGLang does not read this format; for it, export with `--format zlab` and serve {block} draft tokens.
"""
_TRANSFORMERS = """For transformers' own generator, 5.23 or newer. vLLM and SGLang want the draft exported with
`--format zlab`, and then {drafted} speculative tokens in vLLM and {block} draft tokens in SGLang.
{advice}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MuseGlimmerAssistantModel

    target = AutoModelForCausalLM.from_pretrained({target!r})
    draft = MuseGlimmerAssistantModel.from_pretrained("THIS_FOLDER", dtype=target.dtype)
    ids = AutoTokenizer.from_pretrained({target!r})("Once upon a time", return_tensors="pt").input_ids
    positions = torch.arange(ids.shape[1])[None]
    target.generate(ids, assistant_model=draft, speculation_type="dflash", position_ids=positions)
"""


def card(
    record: RunRecord,
    config: DraftConfig,
    state: TrainState,
    kind: str,
    result: dict[str, Any] | None,
    limits: list[str],
) -> str:
    """Return the model card; `result` is the result of `dflash eval` for this draft, if there is one.

    `limits` names clients that cannot serve what this draft was trained to do.
    """
    origin, identity = record.origin, record.identity
    settings = identity["settings"]
    instead = "epochs" if settings["steps"] else "steps"
    made_by = [name for name in _RECIPE if settings.get(name) is not None and name != instead]
    if set(settings["weights"]) == {1.0}:
        made_by.remove("weights")
    if identity["init_from"]:
        made_by.append("init_from")
    made_by += [name for name in config.variant.loss_settings if name in settings]
    recipe = ", ".join(f"{name} {settings.get(name, identity.get(name))}" for name in made_by)
    return f"""# DFlash draft for {origin["target"]}

{_shape(config)} Trained by `dflash-offline` from cached features of the target to step {state.step}.

| | |
|---|---|
| target | {_cell(origin["target"])}, config sha256 {origin["target_identity"]["config_sha256"]} |
| cache | manifest {", ".join(identity["caches"])} |
| recipe | {_cell(recipe)} |
| software | {", ".join(f"{name} {version}" for name, version in sorted(origin["software"].items()))} |

## Acceptance
{_measured(state, result)}
## Serving
{_serving(config, kind, origin["target"], limits, _expected(result))}"""


def converted_card(name: str, config: DraftConfig, kind: str, target: str, limits: list[str]) -> str:
    """Return the model card of a draft that was written from another draft folder, called `name`."""
    return f"""# DFlash draft for {target}

{_shape(config)} Written by `dflash-offline` from the draft {name}, whose card says how it was made.

## Serving
{_serving(config, kind, target, limits, [])}"""


def _expected(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return how many tokens to draft at each concurrency, where that was measured."""
    found: list[dict[str, Any]] = ((result or {}).get("draft_lengths") or {}).get("expected", [])
    return found


def _serving(config: DraftConfig, kind: str, target: str, limits: list[str], expected: list[dict[str, Any]]) -> str:
    """Return how each client serves a draft, with as many drafted tokens as the first of `expected` says."""
    drafted, variant = expected[0]["num_speculative_tokens"] if expected else config.num_draft_tokens, config.variant
    holds, counts = f"one anchor and {config.num_draft_tokens} drafted tokens", "the whole block"
    if variant.first_slot == 0:
        holds, counts = f"{config.num_draft_tokens} drafted tokens, one for every slot", "one more"
    texts = {ZLAB: _ZLAB, SPECULATORS: _SPECULATORS}
    serving = texts.get(kind, _TRANSFORMERS).format(
        target=target,
        quoted=shlex.quote(target),
        holds=holds,
        counts=counts,
        method=variant.vllm_method,
        algorithm=variant.sglang_algorithm,
        drafted=drafted,
        block=drafted + 1,
        advice="".join(f"{_advice(one)}\n" for one in expected),
        aux=", ".join(str(i + 1) for i in config.target_layer_ids),
    )
    return serving + "".join(f"\nNot for {line}\n" for line in limits)


def _shape(config: DraftConfig) -> str:
    """Return what a draft is: first its variant, if that is not the base, with its fields."""
    ids = ", ".join(map(str, config.target_layer_ids))
    own = ", ".join(f"{name} {value}" for name, value in vars(config.variant).items())
    variant = f"{config.variant.summary}\nIts {own}.\n" if config.variant.summary else ""
    return (
        f"{variant}{config.num_hidden_layers} draft layers that read the outputs of target layers {ids}; blocks of "
        f"{config.block_size},\nmask token {config.mask_token_id}."
    )


def _advice(one: dict[str, Any]) -> str:
    number, speedup = one["num_speculative_tokens"], one.get("speedup")
    times = f", {speedup[number - 1]:.2f} times plain decoding" if speedup else ""
    requests = f"{one['concurrency']} request" + ("" if one["concurrency"] == 1 else "s")
    return f"With {requests} at a time, drafting {number} should be fastest{times}."


def _measured(state: TrainState, result: dict[str, Any] | None) -> str:
    lines = []
    if state.best_step:
        lines.append(
            f"In training, the serving walk over held-out samples gave at best {state.best_walk:.2f} tokens a round "
            f"(step {state.best_step})."
        )
    if result is not None:
        pooled, mean = _figure(result["acceptance"]["pooled"]), _figure(result["acceptance"]["mean"])
        config, prompts = result["config"], result["acceptance"]["prompts"]
        way = f"temperature {config['temperature']}" if config.get("temperature") else "greedy"
        what = "cached turns, without the target" if result.get("offline") else "prompts"
        what += f" of {asked['name']} ({asked['dataset']})" if (asked := result.get("prompt_set")) else ""
        speed = f", {result['speedup']:.2f} times the target alone" if result.get("speedup") else ""
        lines.append(
            f"`dflash eval` on {prompts} {what} ({way}, {result['dtype']} on {result['device']}): {pooled} tokens a "
            f"round (mean of prompts {mean}) of at most {result['block_size']}{speed}."
        )
        lines += [
            f"- with drafted tokens {PROPOSALS[one['name']]}: {_figure(one['acceptance']['pooled'])}"
            for one in result.get("proposals", ())
        ]
        for name, group in result.get("acceptance_by_kind", {}).items():
            lines.append(f"- {name}: {_figure(group['pooled'])} over {group['prompts']} prompts")
    return "\n".join(lines or ["Not measured."]) + "\n"


def _cell(text: str) -> str:
    """Return the text of a table's cell."""
    return text.replace("|", "\\|")


def _figure(value: float | None) -> str:
    """Return a mean; a dash where there was no round to take it of."""
    return "-" if value is None else f"{value:.2f}"
