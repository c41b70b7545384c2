"""A draft's layers and its loss, lowered for an H100 at the shapes of a draft for Qwen3-8B, on fake tensors.

Prints JSON: what was compiled, where graphs broke, and what ptxas says of each kernel.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fake_h100
import torch
import triton
from qwen3_8b_draft import CONFIG
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as partitioner
from torch._inductor.codecache import PyCodeCache

from dflash_offline.schemas.draft.config import AttentionRule
from dflash_offline.stages.draft.attention import Blocks, choose_flex_tiles, flex_mask
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.objective import head_cross_entropy

SEQ_LEN, NUM_BLOCKS = 8192, 2048
SUPERVISED = (20_000, 18_001, 30_720)
"""Slots that a step computes the loss of: no two steps are alike in that. In the last one, all of them."""


def step(draft: DraftModel, head: nn.Linear, num_slots: int) -> int:
    """Do a step's forward and backward pass, all but the rows' own selection; returns the bytes kept between them."""
    with torch.device(fake_h100.GPU):
        anchors, documents = torch.zeros(1, NUM_BLOCKS, dtype=torch.long), torch.zeros(1, SEQ_LEN, dtype=torch.long)
        positions = torch.zeros(1, SEQ_LEN + NUM_BLOCKS * CONFIG.block_size, dtype=torch.long)
        noise = torch.zeros(1, NUM_BLOCKS * CONFIG.block_size, CONFIG.hidden_size, dtype=torch.bfloat16)
        features = torch.zeros(1, SEQ_LEN, 5 * CONFIG.hidden_size, dtype=torch.bfloat16)
        rows, labels = torch.zeros(num_slots, dtype=torch.long), torch.zeros(num_slots, dtype=torch.long)
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    blocks = Blocks(anchors, anchors == 0, documents, SEQ_LEN, CONFIG.block_size)
    with torch.autocast("cuda", torch.bfloat16):
        hidden = draft(
            position_ids=positions,
            attention_mask=flex_mask(blocks, AttentionRule()),
            noise_embedding=noise,
            target_hidden=features,
            rows=rows,
        )
        kept = kept_of_blocks(hidden)
        ce, _ = head_cross_entropy(hidden, labels, head, compiled=True)
    ce.sum().backward()
    return kept


def kept_of_blocks(hidden: Tensor) -> int:
    """Return the bytes that autograd keeps of the draft's layers, of what has a row for every block token."""
    tokens = NUM_BLOCKS * CONFIG.block_size
    storages, seen, left = {}, set(), [hidden.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [below for below, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and set(tensor.shape) & {tokens, SEQ_LEN + tokens, len(hidden)}:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())


def lowered() -> dict[str, Any]:
    """Return what was compiled up to each step, the reasons of graph breaks, and the bytes kept of a block token."""
    for name in ("stats", "graph_break", "unimplemented"):
        counters[name].clear()
    compiled, kept = [], 0
    with fake_h100.mode:
        with torch.device(fake_h100.GPU):
            draft = DraftModel(CONFIG, "flex_attention")
            head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False, dtype=torch.bfloat16)
        head.requires_grad_(False)
        for layer in draft.layers:
            layer.compile()
        for num_slots in SUPERVISED:
            kept = step(draft, head, num_slots)
            compiled.append(counters["stats"]["unique_graphs"])
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in draft.parameters())
    block_tokens = NUM_BLOCKS * CONFIG.block_size
    return {"graphs": compiled, "breaks": dict(counters["graph_break"]), "kept": kept / block_tokens}


def assembled(name: str, source: str) -> dict[str, Any]:
    """Return the registers of a thread and the bytes that it spills, as ptxas assembles a kernel for sm_90."""
    kernel = getattr(PyCodeCache.load(source), name)
    with contextlib.redirect_stdout(sys.stderr):
        compiled = kernel._precompile_config(kernel.configs[0])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.kernel.asm["ptx"])
        ran = subprocess.run(
            [ptxas, "-v", "--gpu-name", "sm_90a", ptx, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    (registers,) = re.findall(r"Used (\d+) registers", ran.stderr)
    (stack,) = re.findall(r"(\d+) bytes stack frame", ran.stderr)
    return {"name": name, "registers": int(registers), "stack": int(stack)}


if __name__ == "__main__":
    choose_flex_tiles(sys.argv[1])
    partitioner.activation_memory_budget = float(sys.argv[2])
    result = lowered()
    result["kernels"] = [assembled(name, source) for name, source in sorted(fake_h100.kernels)]
    print(json.dumps(result), flush=True)
    os._exit(0)
