"""Validation on held-out samples: loss, accuracy and both acceptance lengths, each named for what it is."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.metrics import means_of, no_sums, sums_of
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.simulated_serving import WalkSums, serving_walks


def forward(module: DFlashTrainerModule, batch: Batch) -> DFlashStepMetrics:
    """Return the metrics of one micro-batch with the anchors it brings."""
    metrics: DFlashStepMetrics = module(
        batch.input_ids,
        batch.hidden_states,
        batch.loss_mask,
        document_ids=batch.document_ids,
        anchors=batch.anchors,
        keep_mask=batch.keep_mask,
    )
    return metrics


@torch.no_grad()
def validate(
    module: DFlashTrainerModule, batches: Iterable[Batch], autocast: torch.autocast, ranks: Ranks
) -> dict[str, Any]:
    """Return one row of validation over all ranks' batches; every rank gets the same row."""
    draft: nn.Module = module.draft_model
    draft.eval()
    sums, walked = no_sums(module.block_size, ranks.device), WalkSums()
    for batch in batches:
        with autocast:
            sums += sums_of(forward(module, batch))
            for walks in serving_walks(module, batch):
                walked.add(walks)
    draft.train()
    totals = torch.tensor(walked.totals, dtype=torch.float64, device=ranks.device)
    walked = WalkSums(*ranks.add(totals).tolist())
    return {
        **{f"val_{name}": value for name, value in means_of(ranks.add(sums)).items()},
        "val_serving_walk": walked.pooled,
        "val_serving_walk_mean_of_samples": walked.mean_of_samples,
    }
