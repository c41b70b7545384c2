"""Decode prompts with z-lab's reference client on request, for timing it in turn with others.

Runs in a process of its own and imports nothing of this project. DFLASH_ZLAB as in `zlab_generate`.

    python zlab_timed.py DRAFT TARGET

Each line of stdin is JSON: prompts (lists of token ids), max_new_tokens, stop_ids, threads. Each is answered by one
line of stdout: seconds, of all the calls, and tokens, a list for each prompt.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from zlab_generate import load_client


def main() -> None:
    client = load_client()
    draft = client.DFlashDraftModel.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
    target = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32, attn_implementation="sdpa").eval()
    for line in sys.stdin:
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        tokens, began = [], time.perf_counter()
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt])
            output = client.dflash_generate(
                draft,
                target=target,
                input_ids=ids,
                max_new_tokens=job["max_new_tokens"],
                stop_token_ids=job["stop_ids"],
            )
            tokens.append(output[0, len(prompt) :].tolist())
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
