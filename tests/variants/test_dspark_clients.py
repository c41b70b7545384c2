"""DSpark in speculators, in a process of its own: what it computes is what the slow reference computes, and this."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_dspark import biased, confidence, config_json, draft_block, random_weights
from safetensors.torch import load_file, save_file
from test_dflash2_clients import draw, run_script
from torch import nn

from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.trainer import DFlashTrainerModule

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
VOCAB, LENGTH = 40, 17


def test_speculators_computes_what_the_formulas_say_and_what_this_project_does(tmp_path: Path) -> None:
    config: dict[str, Any] = config_json()
    weights = random_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head, table, features = 0.2 * draw((VOCAB, 32), 1), draw((VOCAB, 32), 2), draw((LENGTH, 64), 3)
    tokens = torch.randint(VOCAB - 1, (LENGTH,), generator=torch.Generator().manual_seed(4))
    final = draw((LENGTH, 32), 5)
    save_file(
        {"head": head, "table": table, "tokens": tokens, "target_hidden": features, "final": final},
        tmp_path / "inputs",
    )
    arguments = tmp_path, tmp_path / "inputs", tmp_path / "outputs"
    found = load_file(run_script(HERE / "speculators_dspark.py", "DFLASH_SPECULATORS", *arguments))
    assert found["anchors"].tolist() == list(range(LENGTH - 4))
    distances, said = torch.zeros(13, 4), torch.zeros(13, 4)
    for n, a in enumerate(found["anchors"].tolist()):
        ids = torch.tensor([int(tokens[a]), 39, 39, 39])
        hidden = draft_block(weights, config, features[:a], table[ids])
        torch.testing.assert_close(found["hidden"][n].double(), hidden, atol=1e-5, rtol=1e-5)
        for k in range(4):
            before = int(tokens[a + k])
            logits = biased(weights, head.double() @ hidden[k], before)
            torch.testing.assert_close(found["logits"][n, k].double(), logits, atol=1e-5, rtol=1e-5)
            taught = head.double() @ final[a + k].double()
            torch.testing.assert_close(found["targets"][n, k].double(), taught, atol=1e-5, rtol=1e-5)
            sure = confidence(weights, hidden[k], before)
            torch.testing.assert_close(found["confidence"][n, k].double(), sure, atol=1e-5, rtol=1e-5)
            distances[n, k] = (logits.softmax(0) - taught.softmax(0)).abs().sum()
            said[n, k] = torch.sigmoid(sure)
    linear, embedding = nn.Linear(32, VOCAB, bias=False), nn.Embedding(VOCAB, 32)
    linear.weight, embedding.weight = nn.Parameter(head), nn.Parameter(table)
    trainer = DFlashTrainerModule(
        load_draft(tmp_path), linear, embedding, 39, block_size=4, attention_backend="sdpa", loss_decay_gamma=None
    )
    with torch.no_grad():
        step = trainer(
            tokens[None],
            features[None],
            torch.ones_like(tokens)[None],
            anchors=found["anchors"][None],
            final=final[None],
        )
    assert step.part_sums["l1_loss"].item() == pytest.approx(distances.sum().item(), rel=1e-5)
    assert step.part_sums["mean_confidence"].item() == pytest.approx(said.sum().item(), rel=1e-5)
    right = [(found["logits"][n].argmax(-1) == tokens[a + 1 : a + 5]).tolist() for n, a in enumerate(range(13))]
    assert step.correct_by_slot.tolist() == torch.tensor(right).sum(0).tolist()
