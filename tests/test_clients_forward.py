"""The drafts we train, run by the real serving clients in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ATTENTION, tiny_batch, tiny_draft, tiny_trainer

from dflash_offline.stages.drafter import draft_state_dict

pytestmark = pytest.mark.clients
SCRIPT = Path(__file__).parent / "clients" / "zlab_forward.py"


def zlab_folder() -> Path:
    folder = os.environ.get("DFLASH_ZLAB", "")
    if not (Path(folder) / "dflash" / "model.py").is_file():
        pytest.fail(
            f"DFLASH_ZLAB is {folder!r}; expected a folder that holds z-lab's unpacked package `dflash`. "
            f"Run `make check-clients`, which unpacks it and sets the variable."
        )
    return Path(folder)


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_zlab_client_computes_what_the_trainer_trains_packed_or_step_by_step_or_cached(
    attention: str, tmp_path: Path
) -> None:
    client = zlab_folder()
    trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]))
    draft, length = trainer.draft_model, 15
    batch = tiny_batch(draft.config, [length])
    batch.loss_mask.fill_(1)
    # Without context the client's cache is fed nothing in its first round; a real prompt has at least one token.
    anchors = torch.arange(1, length)
    calls: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    hook = draft.register_forward_hook(lambda _, args, call, output: calls.append((call, output)), with_kwargs=True)
    trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, anchors=anchors[None])
    hook.remove()
    call, packed = calls[0]

    (tmp_path / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config), tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = {
        "target_hidden": batch.hidden_states[0].clone(),
        "token_embedding": trainer.target_embed_tokens(batch.input_ids[0]),
        "mask_embedding": trainer.target_embed_tokens.weight[draft.config.mask_token_id].clone(),
        "anchors": anchors,
    }
    one_mask = isinstance(call["attention_mask"], torch.Tensor)  # the client's call takes no mask of every kind
    if one_mask:
        inputs |= {f"packed.{name}": x.clone() for name, x in call.items()}
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "inputs.safetensors"), str(tmp_path / "out")]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(client)}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    outputs = load_file(tmp_path / "out")
    assert one_mask == ("packed" in outputs)
    if one_mask:
        torch.testing.assert_close(outputs["packed"], packed, atol=1e-5, rtol=1e-5)
    blocks = packed[0].unflatten(0, (len(anchors), draft.config.block_size))
    torch.testing.assert_close(outputs["step"], blocks, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["cached"], blocks, atol=1e-5, rtol=1e-5)
