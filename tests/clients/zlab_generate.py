"""Decode prompts with z-lab's reference client and write what it did as JSON.

Runs in a process of its own and imports nothing of this project. DFLASH_ZLAB names a folder that holds the client's
unpacked package `dflash`.

    python zlab_generate.py JOB RESULT

JOB is JSON: draft and target (folders), prompts (lists of token ids), max_new_tokens, stop_ids.
RESULT becomes JSON: tokens and acceptance_lengths, a list for each prompt; missing_keys and unexpected_keys; and the
draft's class, which is the one that its config.json names.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def load_client() -> Any:
    """Return the client's module, with a clock that also works without a GPU."""
    sys.path.insert(0, os.environ["DFLASH_ZLAB"])
    from dflash import model as client

    client._cuda_time = time.perf_counter
    return client


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job's result."""
    client = load_client()
    (architecture,) = json.loads(Path(job["draft"], "config.json").read_text())["architectures"]
    draft, info = getattr(client, architecture).from_pretrained(
        job["draft"], dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    target = AutoModelForCausalLM.from_pretrained(job["target"], dtype=torch.float32, attn_implementation="sdpa")
    draft.eval()
    target.eval()
    tokens, acceptance_lengths = [], []
    for prompt in job["prompts"]:
        run = client.dflash_generate(
            draft,
            target=target,
            input_ids=torch.tensor([prompt]),
            max_new_tokens=job["max_new_tokens"],
            stop_token_ids=job["stop_ids"],
            return_stats=True,
        )
        tokens.append(run.output_ids[0, len(prompt) :].tolist())
        acceptance_lengths.append(run.acceptance_lengths)
    return {
        "class": type(draft).__name__,
        "tokens": tokens,
        "acceptance_lengths": acceptance_lengths,
        "missing_keys": sorted(map(str, info["missing_keys"])),
        "unexpected_keys": sorted(map(str, info["unexpected_keys"])),
    }


def main() -> None:
    job_path, result_path = (Path(name) for name in sys.argv[1:3])
    torch.set_num_threads(1)
    result_path.write_text(json.dumps(decode(json.loads(job_path.read_text()))))


if __name__ == "__main__":
    main()
