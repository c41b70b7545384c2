"""The draft model: its weights, its step forward and its cache."""

import json
from pathlib import Path

import pytest
import torch
from reference import draft_one_block
from safetensors.torch import save_file
from tiny import ATTENTION, tiny_draft, tiny_draft_config
from torch import Tensor, nn

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.stages.draft import model as drafter
from dflash_offline.stages.draft.model import DraftCache, DraftModel, RMSNorm, rotary_inv_freq, rotary_table
from dflash_offline.stages.draft.weights import draft_state_dict, load_draft


def inputs(draft: DraftModel, context: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = draft.config
    return {
        "position_ids": torch.arange(context + config.block_size)[None],
        "noise_embedding": torch.randn(1, config.block_size, config.hidden_size, generator=generator),
        "target_hidden": torch.randn(
            1, context, len(config.target_layer_ids) * config.hidden_size, generator=generator
        ),
    }


def write_draft(draft: DraftModel, folder: Path) -> dict[str, Tensor]:
    weights = draft_state_dict(draft, draft.config)
    (folder / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(weights, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("layers", [1, 3])
def test_draft_has_exactly_the_keys_and_shapes_the_clients_read(layers: int) -> None:
    draft = tiny_draft(num_hidden_layers=layers)
    found = {name: tuple(w.shape) for name, w in draft.state_dict().items()}
    assert found == draft.config.shapes
    assert not any("rotary" in name or "embed" in name or "head" in name for name in found)


@pytest.mark.parametrize("attention", ATTENTION)
def test_draft_forward_equals_the_slow_reference(attention: str) -> None:
    draft = tiny_draft(**ATTENTION[attention])
    x = inputs(draft, context=7)
    expected = draft_one_block(
        dict(draft.named_parameters()), draft.config, x["target_hidden"][0], x["noise_embedding"][0], 7
    )
    torch.testing.assert_close(draft(**x)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_draft_backends_agree_with_and_without_a_mask(kv_heads: int) -> None:
    draft = tiny_draft(num_key_value_heads=kv_heads)
    x = inputs(draft, context=9)
    mask = torch.rand(1, 1, 4, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., -1] = True
    for m in (None, mask):
        draft.attention_backend = "sdpa"
        sdpa = draft(**x, attention_mask=m)
        draft.attention_backend = "eager"
        torch.testing.assert_close(draft(**x, attention_mask=m), sdpa, atol=2e-6, rtol=1e-5)


def test_draft_refuses_an_unknown_backend() -> None:
    with pytest.raises(DflashError, match="'flash'"):
        DraftModel(tiny_draft_config(), attention_backend="flash")


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_draft_cache_fed_in_pieces_equals_the_whole_context(attention: str) -> None:
    draft, cache = tiny_draft(**ATTENTION[attention]), DraftCache()
    x = inputs(draft, context=40)
    start = 0
    for stop in (17, 18, 18, 31, 40):  # one round adds nothing
        piece = draft(
            position_ids=x["position_ids"][:, start : stop + 4],
            noise_embedding=x["noise_embedding"],
            target_hidden=x["target_hidden"][:, start:stop],
            past_key_values=cache,
        )
        assert cache.length == stop + 4
        cache.crop(stop)
        whole = draft(
            position_ids=x["position_ids"][:, : stop + 4],
            noise_embedding=x["noise_embedding"],
            target_hidden=x["target_hidden"][:, :stop],
        )
        torch.testing.assert_close(piece, whole, atol=2e-6, rtol=1e-5)
        start = stop


@torch.no_grad()
def test_draft_cache_grows_and_keeps_what_it_held() -> None:
    cache = DraftCache()
    keys = torch.randn(1, 2, 700, 8)
    for start in range(0, 700, 100):
        held, _ = cache.append(0, keys[:, :, start : start + 100], keys[:, :, start : start + 100])
        cache.advance(100)
    assert torch.equal(held, keys)
    with pytest.raises(AssertionError):
        cache.crop(701)


def test_draft_in_bfloat16_still_computes_rotary_angles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tiny_draft().to(torch.bfloat16)
    used: list[Tensor] = []

    def noted(position_ids: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        used.append(inv_freq)
        return rotary_table(position_ids, inv_freq, dtype)

    monkeypatch.setattr(drafter, "rotary_table", noted)
    x = inputs(draft, context=3)
    x |= {name: x[name].bfloat16() for name in ("noise_embedding", "target_hidden")}
    assert draft(**x).dtype == torch.bfloat16
    assert used[0].dtype == torch.float32
    exact = [10_000.0 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(used[0].double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=0)


def test_rotary_table_is_exact_at_long_positions_before_it_is_cast() -> None:
    positions = torch.tensor([[0, 1, 4095, 30_001]])
    cos, sin = rotary_table(positions, rotary_inv_freq(8, 10_000.0), torch.bfloat16)
    angles = positions[0, :, None].double() * torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)]).double()
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), atol=0.01, rtol=0)
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), atol=0.01, rtol=0)


def test_draft_initial_weights_are_normal_and_norms_one() -> None:
    draft = DraftModel(tiny_draft_config(hidden_size=128))
    for module in draft.modules():
        if isinstance(module, RMSNorm):
            assert bool((module.weight == 1).all())
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.1)


def test_load_draft_returns_what_was_written(tmp_path: Path) -> None:
    draft = tiny_draft()
    write_draft(draft, tmp_path)
    loaded = load_draft(tmp_path, torch.float32, "cpu")
    assert loaded.config == draft.config and not loaded.training
    x = inputs(draft, context=5)
    assert torch.equal(loaded(**x), draft(**x))
    assert {w.dtype for w in load_draft(tmp_path, torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}


def test_load_draft_lists_every_missing_unexpected_and_misshapen_weight(tmp_path: Path) -> None:
    weights = write_draft(tiny_draft(), tmp_path)
    del weights["fc.weight"], weights["layers.1.mlp.up_proj.weight"]
    weights["model.embed_tokens.weight"] = torch.zeros(2, 3)
    weights["norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError) as error:
        load_draft(tmp_path, torch.float32, "cpu")
    for line in (
        "fc.weight is missing; expected [32, 64]",
        "layers.1.mlp.up_proj.weight is missing; expected [48, 32]",
        "model.embed_tokens.weight [2, 3] is in no client's draft",
        "norm.weight is [5]; expected [32]",
    ):
        assert line in str(error.value)


def test_load_draft_names_a_missing_or_damaged_weight_file(tmp_path: Path) -> None:
    write_draft(tiny_draft(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(DflashError, match="not a readable safetensors file"):
        load_draft(tmp_path, torch.float32, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DflashError, match="does not exist"):
        load_draft(tmp_path, torch.float32, "cpu")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    weights = write_draft(tiny_draft(), tmp_path)
    weights["fc.weight"][0, 0] = float("nan")
    weights["norm.weight"][1] = float("inf")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DflashError, match=r"not finite in fc\.weight, norm\.weight\."):
        load_draft(tmp_path)
