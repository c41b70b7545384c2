"""Decode prompts with vLLM in one process, offline, and write what every round gave as JSON.

Runs in a process of its own and imports nothing of this project; vLLM is found through PYTHONPATH.

    python vllm_generate.py JOB RESULT

JOB is JSON: draft (a folder; None decodes by the target alone), target, prompts (lists of token ids), max_new_tokens,
temperature, dtype, speculative (what joins vLLM's speculative_config). RESULT becomes JSON: tokens, and accepted, the
drafted tokens that each round took, both lists with an entry for each prompt; version; repaired, whether the plugin was
at work; runner, the model runner's module.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm
from vllm import LLM, SamplingParams
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job's result."""
    speculative = None
    if job["draft"] is not None:
        speculative = {"method": "dflash", "model": job["draft"], **job["speculative"]}
    llm = LLM(
        model=job["target"],
        dtype=job["dtype"],
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        generation_config="vllm",
        per_request_spec_decode_metrics="detailed",
        speculative_config=speculative,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    settings = [
        SamplingParams(temperature=job["temperature"], seed=seed, max_tokens=job["max_new_tokens"])
        for seed in range(len(prompts))
    ]
    answers = [request.outputs[0] for request in llm.generate(prompts, settings, use_tqdm=False)]
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "accepted": [answer.spec_decode_metrics.per_step_accepted for answer in answers] if speculative else None,
        "version": vllm.__version__,
        "repaired": DFlashQwen3Model._normalize_context_k.__module__ == "dflash_vllm_repairs",
        "runner": type(worker.model_runner).__module__,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(decode(json.loads(Path(sys.argv[1]).read_text()))))
