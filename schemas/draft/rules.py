"""What the clients demand of a draft folder: each rule with its reason, and which clients break without it.

Read in the sources of z-lab's reference client (0.1.0), vLLM's `qwen3_dflash` model and its reader of speculators
configs, SGLang's `dflash` model and its parser of draft configs, speculators (0.9.0) and transformers (5.23).
"""

from dataclasses import dataclass

ZLAB, VLLM, SGLANG = "z-lab", "vLLM", "SGLang"
SPECULATORS, TRANSFORMERS = "speculators", "transformers"
EVERY = (ZLAB, VLLM, SGLANG)


@dataclass(frozen=True)
class Rule:
    """One demand."""

    why: str
    """What a client does with a draft that does not meet it."""
    breaks: tuple[str, ...]
    clear: bool = False
    """Whether a draft that does not meet it still says what it computes, so that this program reads it."""


@dataclass(frozen=True, kw_only=True)
class DraftFault:
    """One demand that a draft does not meet."""

    rule: str
    """Its name in `RULES`."""
    place: str
    what: str
    """What was found and what was expected."""
    why: str
    breaks: tuple[str, ...]
    """The clients that refuse the draft or serve it wrongly; none where only older readers may."""


def make_fault(name: str, place: str, what: str, kind: str = "zlab") -> DraftFault:
    """Return the fault of a draft of one of the export formats, with the rule's reason and the clients it breaks."""
    rule = RULES[name]
    clients = {SPECULATORS: (VLLM, SPECULATORS), TRANSFORMERS: (TRANSFORMERS,)}.get(kind, rule.breaks)
    return DraftFault(rule=name, place=place, what=what, why=rule.why, breaks=clients if rule.breaks else ())


RULES = {
    "config": Rule("every client builds the draft from config.json", EVERY),
    "architecture": Rule("clients choose their draft class by this name, and it says what the tensors are for", EVERY),
    "no architecture": Rule("vLLM and SGLang choose their draft class by this name", (VLLM, SGLANG), clear=True),
    "variant's shape": Rule("clients build the variant's own parts by these numbers", EVERY),
    "variant's heads": Rule("clients build its heads as these say, and others than these are not computed here", EVERY),
    "kernel and block": Rule("z-lab's client fails at it, and speculators refuses it", (ZLAB,), clear=True),
    "nested variant's shape": Rule("vLLM looks for it in dflash_config alone", (VLLM,), clear=True),
    "model type": Rule(
        "it chooses the config class, and only Qwen3's has the fields and the defaults that a draft is read with",
        EVERY,
        clear=True,
    ),
    "shape": Rule("a missing or impossible size falls back to a client's own default, which differs", EVERY),
    "activation": Rule("SGLang's draft has no other; vLLM and z-lab's client would use another function", EVERY),
    "logits": Rule(
        "z-lab's client and SGLang apply it and vLLM does not: the served draft is then not the trained one", (VLLM,)
    ),
    "block size": Rule(
        "z-lab's client and SGLang take the nested value first and older versions the other, so the draft gets blocks "
        "it was not trained for; a user sets vLLM's number of speculative tokens by it",
        EVERY,
    ),
    "one place": Rule(
        "z-lab's client, vLLM and SGLang find it in the other place, as in z-lab's own drafts; some older readers look "
        "in this one alone",
        (),
        clear=True,
    ),
    "not computed": Rule("the clients compute it, `dflash eval` and `dflash train --init-from` do not", ()),
    "nested layer ids": Rule(
        "vLLM looks for them in dflash_config alone, and falls back to a default", (VLLM,), clear=True
    ),
    "nested mask token": Rule(
        "vLLM and SGLang look for it in dflash_config alone, and refuse or make up a token", (VLLM, SGLANG), clear=True
    ),
    "quantization": Rule("the draft is read as plain floating-point numbers, and a client would unpack them", EVERY),
    "layer ids": Rule(
        "they name the hidden states the draft reads; one layer off gives right text and few accepted tokens. Where "
        "they are absent clients fall back to a default, and SGLang and vLLM read them in different places",
        EVERY,
    ),
    "last layer": Rule(
        "the last layer's output is read after the final norm by some clients and before it by others", EVERY
    ),
    "layer ids as recorded": Rule(
        "the weights were trained on the layers that their file records; with others the text is right and few tokens "
        "are accepted",
        EVERY,
    ),
    "layer ids shifted": Rule(
        "id i is the output of decoder layer i, entry i + 1 of transformers' hidden states, and clients add that 1",
        EVERY,
    ),
    "target layers": Rule("z-lab's client reads it always, and SGLang checks the layer ids against it", (ZLAB, SGLANG)),
    "mask token": Rule(
        "slots to be drafted are filled with its embedding: without a real row vLLM and SGLang refuse or read out of "
        "bounds, and with another one than trained few tokens are accepted",
        EVERY,
    ),
    "rotary base": Rule(
        "vLLM, SGLang and transformers 5 read rope_parameters, older transformers and MLX rope_theta; where they "
        "differ, clients turn keys differently",
        EVERY,
    ),
    "rotary keys": Rule(
        "left over from a target's config, it makes vLLM and transformers build another rotary table without a word",
        (ZLAB, VLLM),
    ),
    "rotary scaling": Rule(
        "older transformers read rope_scaling, newer ones rope_parameters; both must say the same", EVERY
    ),
    "layer types": Rule("SGLang refuses any other, and every client reads one entry for each layer", EVERY),
    "no layer types": Rule(
        "every client reads one entry for each layer, and takes them for full ones only by a default of its own",
        EVERY,
        clear=True,
    ),
    "window": Rule("vLLM and SGLang refuse sliding layers without one; z-lab's client then shows everything", EVERY),
    "window size": Rule("below a block, clients differ in what a block sees of itself", EVERY),
    "hidden window": Rule("vLLM makes every layer slide when it is set, the others read layer_types", EVERY),
    "causality": Rule(
        "z-lab's client reads is_causal alone, older vLLM dflash_config.causal alone; without either, sliding layers "
        "are causal and full ones are not",
        (ZLAB, VLLM),
    ),
    "causality in SGLang": Rule(
        "SGLang reads neither key: sliding layers are causal there and full ones are not", (SGLANG,), clear=True
    ),
    "head in vLLM": Rule(
        "vLLM takes the candidates of this variant from an unquantized head alone", (VLLM,), clear=True
    ),
    "weights": Rule("the weights are read from safetensors files", EVERY),
    "format": Rule("transformers before 5 refuses a file whose metadata does not name its format", (ZLAB,)),
    "prefix": Rule("vLLM adds `model.` itself, and then finds no parameter of that name", (VLLM,)),
    "missing": Rule("z-lab's client and SGLang serve random or empty values in its place; vLLM refuses", EVERY),
    "unexpected": Rule("vLLM refuses a tensor it has no parameter for, or takes it over the target's own", (VLLM,)),
    "tensor shape": Rule("no client can load it", EVERY),
    "dtype": Rule("a draft is read as plain floating-point numbers", EVERY),
    "finite": Rule("one NaN spreads through every drafted token", EVERY),
    "checksum": Rule("it was damaged or changed after it was written, and is not what was trained", EVERY),
    "card": Rule("it was changed after the export; people read it, and no client does", ()),
    "target": Rule("the draft borrows the target's embeddings and head and reads its layers", EVERY),
    "speculators config": Rule("vLLM and speculators refuse a config without it", (VLLM, SPECULATORS)),
    "speculative tokens": Rule(
        "vLLM takes its number of speculative tokens from it: the slots that predict", (VLLM, SPECULATORS)
    ),
    "anchor": Rule("by it a client takes a token from slot 0, or takes none", (VLLM, SPECULATORS)),
    "window causality": Rule(
        "its defaults differ, and vLLM takes it for every layer: not true makes full layers causal", (VLLM,)
    ),
    "vocabulary": Rule("a smaller draft vocabulary needs mapping tables that this format does not have", EVERY),
    "default layers": Rule("transformers' class makes every layer slide where none are named", (TRANSFORMERS,)),
}
ONE_CLIENTS_LIMIT = ("causality in SGLang", "head in vLLM")
"""Rules that a sound draft may break: what it was trained to do, one client cannot. Its card says so."""
