"""Decode prompts with transformers' own DFlash generator and write what it did as JSON.

Runs in a process of its own and imports nothing of this project; transformers is 5.23 or newer, found before any other
through PYTHONPATH.

    python transformers_generate.py JOB RESULT

JOB is JSON: draft (in the transformers format) and target (folders), prompts (lists of token ids), max_new_tokens,
stop_ids. RESULT becomes JSON: tokens, plain (the target's own greedy answer, by `generate`), target_calls, each a list
with an entry for each prompt; missing_keys and unexpected_keys; the version of transformers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, MuseGlimmerAssistantModel


@torch.inference_mode()
def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job's result."""
    draft, info = MuseGlimmerAssistantModel.from_pretrained(
        job["draft"], dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    target = AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.float32, attn_implementation="sdpa")
    draft.eval()
    target.eval()
    settings = {"do_sample": False, "max_new_tokens": job["max_new_tokens"], "pad_token_id": 0}
    settings["eos_token_id"] = job["stop_ids"] or None
    target.generation_config = GenerationConfig(**settings)
    calls: list[int] = []
    target.register_forward_pre_hook(lambda module, args: calls.append(1))
    result: dict[str, Any] = {"tokens": [], "plain": [], "target_calls": []}
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids))
        calls.clear()
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(len(prompt))[None],
            assistant_model=draft,
            speculation_type="dflash",
        )
        result["target_calls"].append(len(calls))
        result["tokens"].append(output[0, len(prompt) :].tolist())
        result["plain"].append(plain[0, len(prompt) :].tolist())
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {**result, **{name: sorted(map(str, info[name])) for name in names}, "version": transformers.__version__}


def main() -> None:
    job_path, result_path = (Path(name) for name in sys.argv[1:3])
    torch.set_num_threads(1)
    result_path.write_text(json.dumps(decode(json.loads(job_path.read_text()))))


if __name__ == "__main__":
    main()
