"""A draft's config.json: what it says of attention, and what is refused because clients would not agree on it."""

import re
from typing import Any

import pytest
from tiny import ATTENTION, tiny_draft_config

from dflash_offline.schemas.draft.config import CAUSAL_LAYERS, DraftConfig
from dflash_offline.schemas.errors import DflashError


@pytest.mark.parametrize("name", ATTENTION)
def test_a_draft_reads_back_from_its_config(name: str) -> None:
    config = tiny_draft_config(**ATTENTION[name])
    assert DraftConfig.from_json(config.to_json(), "config.json") == config


def test_every_combination_of_windows_and_causality_survives_its_config() -> None:
    for layers in ((), (0,), (1,), (0, 1)):
        for causal in CAUSAL_LAYERS:
            window = {"sliding_window": 8, "sliding_layers": layers} if layers else {}
            if causal == "sliding" and not layers:
                with pytest.raises(DflashError, match="no layer slides"):
                    tiny_draft_config(causal_layers=causal)
                continue
            config = tiny_draft_config(**window, causal_layers=causal)
            rules = [config.attention_rules[kind].causal for kind in config.layer_types]
            assert rules == [causal == "all" or (causal == "sliding" and i in layers) for i in range(2)]
            assert DraftConfig.from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize("name", ATTENTION)
def test_causality_is_said_for_every_client_or_left_to_all_clients_common_default(name: str) -> None:
    document = tiny_draft_config(**ATTENTION[name]).to_json()
    said = document.get("is_causal"), document["dflash_config"].get("causal")
    assert (
        said
        == {
            "full": (None, False),
            "causal": (True, True),
            "sliding": (False, False),
            "causal sliding": (True, True),
            "one sliding": (False, False),
            "one causal sliding": (None, None),
        }[name]
    )
    assert document["use_sliding_window"] == ("sliding_attention" in document["layer_types"])


def test_a_config_that_does_not_speak_of_causality_has_causal_sliding_layers_only() -> None:
    document = tiny_draft_config(sliding_window=8, sliding_layers=(0,)).to_json()
    del document["is_causal"], document["dflash_config"]["causal"]
    assert DraftConfig.from_json(document, "config.json").causal_layers == "sliding"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"sliding_window": None}, "sliding_window is absent"),
        ({"sliding_window": "8"}, 'sliding_window is "8"'),
        ({"use_sliding_window": False}, "use_sliding_window false"),
        ({"is_causal": None}, "is_causal is absent, and dflash_config.causal false"),
        ({"is_causal": True}, "is_causal is true, and dflash_config.causal false"),
        ({"is_causal": "no"}, 'is_causal is "no"; expected true, false or nothing'),
        ({"dflash_config": {"use_swa": True, "causal": False}}, "use_swa is true"),
        ({"sliding_window": 3}, "sliding_window is 3; expected at least a block of 4"),
    ],
)
def test_a_config_that_leaves_open_what_its_layers_see_is_refused(changed: dict[str, Any], message: str) -> None:
    document = tiny_draft_config(sliding_window=8, sliding_layers=(0,)).to_json()
    with pytest.raises(DflashError, match=message):
        DraftConfig.from_json(document | changed, "config.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_scaling.rope_type is "yarn"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type is "linear"'),
        ({"rope_parameters": {"rope_type": "llama3"}}, 'rope_parameters.rope_type is "llama3"'),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rope_theta is 10000.0, and rope_parameters.rope_theta 500.0"),
        ({"rope_parameters": {"mrope_section": [1, 2]}}, "rope_parameters.mrope_section is"),
        ({"rope_scaling": {"mrope_interleaved": True}}, "rope_scaling.mrope_interleaved is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; expected "silu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"output_multiplier": 0.5}, "output_multiplier is 0.5"),
        ({"dflash_config": {"causal": False, "input_embedding_scale": 8.0}}, "input_embedding_scale is 8.0"),
        ({"dflash_config": "x"}, 'dflash_config is "x"; expected an object'),
        ({"rope_parameters": ["x"]}, 'rope_parameters is ["x"]; expected an object'),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0; expected an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta is Infinity"),
    ],
)
def test_a_config_of_what_is_not_computed_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    document = tiny_draft_config().to_json()
    harmless = {"output_multiplier": 1.0, "partial_rotary_factor": 1.0, "rope_parameters": None}
    assert DraftConfig.from_json(document | harmless, "config.json") == tiny_draft_config()
    with pytest.raises(DflashError, match=re.escape(message)):
        DraftConfig.from_json(document | changed, "config.json")


def test_a_draft_lists_every_bad_setting_of_its_attention_at_once() -> None:
    with pytest.raises(DflashError) as error:
        tiny_draft_config(sliding_window=2, sliding_layers=(1, 2), causal_layers="some")
    for text in ("sliding_layers is [1, 2]", "sliding_window is 2", "causal_layers is 'some'"):
        assert text in str(error.value)
    with pytest.raises(DflashError, match="sliding_window is absent"):
        tiny_draft_config(sliding_layers=(1,))
    with pytest.raises(DflashError, match="expected both or neither"):
        tiny_draft_config(sliding_window=8)
