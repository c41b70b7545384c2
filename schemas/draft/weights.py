"""The tensors of a draft: what they must be, and what a safetensors file says of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dflash_offline.schemas.sealed import parse_json
from dflash_offline.schemas.variants.variant import Variant

_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
"""How each dtype says that a value is not finite: every bit of its exponent, in a number of this type, is set."""
CHUNK_BYTES = 64 << 20


def expected_shapes(sizes: Mapping[str, Any], variant: Variant) -> dict[str, tuple[int, ...]]:
    """Return the exact key set of a draft's weights with every shape, as all clients read them.

    `sizes` holds the sizes and the layer ids of a draft's config.json, or the fields of a `DraftConfig`.
    """
    hidden, head_dim, inner = sizes["hidden_size"], sizes["head_dim"], sizes["intermediate_size"]
    queries, keys = sizes["num_attention_heads"] * head_dim, sizes["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(sizes["target_layer_ids"]) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | variant.shapes(sizes)


Shape = tuple[int, ...]


def shape_faults(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Iterator[tuple[str, str, str]]:
    """Yield rule, tensor and what is wrong, for every tensor that is missing, unexpected or of another shape."""
    for name, shape in expected.items():
        if name not in found:
            yield "missing", name, f"is missing; expected {list(shape)}"
        elif found[name] != shape:
            yield "tensor shape", name, f"is {list(found[name])}; expected {list(shape)}"
    for name in sorted(found.keys() - expected.keys()):
        yield "unexpected", name, f"{list(found[name])} is in no client's draft"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, without its values."""

    path: Path
    dtype: str
    """As safetensors names it: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int

    @property
    def is_float(self) -> bool:
        """Whether its values can be checked to be finite, and read by every client."""
        return self.dtype in _EXPONENTS

    def count_not_finite(self) -> int:
        """Return how many values are NaN or infinite, read in pieces; 0 for a dtype that has none."""
        if not self.is_float:
            return 0
        import numpy as np  # takes a while, which `dflash --help` has no need of

        kind, exponent = _EXPONENTS[self.dtype]
        count = 0
        with self.path.open("rb") as file:
            file.seek(self.begin)
            for begin in range(self.begin, self.end, CHUNK_BYTES):
                bits = np.frombuffer(file.read(min(CHUNK_BYTES, self.end - begin)), kind)
                count += int(((bits & bits.dtype.type(exponent)) == exponent).sum())
        return count


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return a safetensors file's tensors by name, and its metadata; `ValueError` if it is damaged."""
    try:
        with safe_open(path, "numpy"):  # checks the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), path)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), begin, end)
    return tensors, metadata
