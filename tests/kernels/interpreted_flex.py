"""Flex attention as inductor writes it for an H100, run by Triton's interpreter, against dense attention.

Prints a line of JSON for each case: the relative errors of the output and of each gradient.
"""

import json
import os
import sys

import fake_h100
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from dflash_offline.schemas.draft.config import AttentionRule
from dflash_offline.stages.draft import attention
from dflash_offline.stages.draft.attention import Blocks, attend, choose_flex_tiles, dense_mask, flex_mask

RULES = {
    "full": AttentionRule(),
    "causal": AttentionRule(window=40, causal=True),
    "window": AttentionRule(window=150),
}
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 1, 16, 8


def blocks_of(rows: int) -> Blocks:
    """Return blocks of packed rows whose lengths no tile of 128 divides, two of each row's not kept.

    All of the first tile of queries see the whole first tile of keys.
    """
    documents = torch.cat([torch.full((n,), number) for number, n in ((0, 287), (1, 30), (2, 20), (-1, 9))])
    first = torch.tensor([*range(140, 284, 9), 5, 60, 130, 290, 300, 318, 325, 335])
    anchors = torch.stack([first + row for row in range(rows)])
    keep = torch.ones_like(anchors, dtype=torch.bool)
    keep[:, [18, 21]] = False
    return Blocks(anchors, keep, documents.expand(rows, -1), len(documents), BLOCK_SIZE)


def placed(mask: BlockMask) -> BlockMask:
    """Put all that a mask holds, and what its function looks up, onto the GPU."""
    for name, value in list(vars(mask).items()):
        if isinstance(value, Tensor):
            setattr(mask, name, fake_h100.put(value))
    for cell in mask.mask_mod.__closure__:
        if isinstance(cell.cell_contents, Tensor):
            cell.cell_contents = fake_h100.put(cell.cell_contents)
    return mask


def break_mask(mask: BlockMask, defect: str) -> None:
    """Leave out a tile of those that a kernel visits, in one of the lists."""
    for kind in ("full_", ""):
        counts = getattr(mask, kind + {"tile": "kv_num_blocks", "transposed tile": "q_num_blocks"}[defect])
        counts[..., -1] = (counts[..., -1] - 1).clamp(min=0)


def errors(rule_name: str, rows: int, tiles: str, defect: str) -> list[float]:
    """Return the relative errors of the output and of the gradients of queries, keys and values."""
    torch.manual_seed(0)
    choose_flex_tiles(tiles)
    rule, blocks = RULES[rule_name], blocks_of(rows)
    num_keys = blocks.seq_len + blocks.num_queries
    q = torch.randn(rows, HEADS, blocks.num_queries, HEAD_DIM, requires_grad=True)
    k, v = (torch.randn(rows, KV_HEADS, num_keys, HEAD_DIM, requires_grad=True) for _ in range(2))
    above = torch.randn_like(q)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(blocks, rule), enable_gqa=True)
    expected = (dense, *torch.autograd.grad(dense, (q, k, v), above))
    mask = flex_mask(blocks, rule)
    assert mask.full_kv_num_blocks is not None and (rule.window or mask.full_kv_num_blocks.any())
    if defect == "window":
        mask.mask_mod = attention._interval_mask(blocks, AttentionRule(causal=rule.causal))
    elif defect:
        break_mask(mask, defect)
    with fake_h100.mode:
        mask = placed(mask)
        inputs = [fake_h100.put(x).requires_grad_() for x in (q, k, v)]
        found = attend(*inputs, mask, "flex_attention")
        found.backward(fake_h100.put(above))
        made = [fake_h100.held(x) for x in (found, *(x.grad for x in inputs))]
    return [((mine - its).norm() / its.norm()).item() for mine, its in zip(made, expected, strict=True)]


for case in sys.argv[1:]:
    print(json.dumps(errors(*json.loads(case))), flush=True)
assert any("flex_attention_backward" in name for name, _ in fake_h100.kernels)
os._exit(0)
