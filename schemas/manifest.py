"""manifest.json: what made a cache and how it is laid out; written once, before the first shard."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from dflash_offline.schemas.checked import (
    Count,
    Counts,
    Index,
    LayerIndex,
    PathWithin,
    Sha256,
    Size,
    checked,
    unlike,
)
from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import NOT_THE_FILES, sha256_file
from dflash_offline.schemas.paths import refuse_other_than_utf8
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes

FORMAT_VERSION = 2
CAPTURE_RULE = "output of decoder layer i, before any final norm"
HISTORY_RULE = "as served, a sample an answer where the template rewrites it"
"""How a conversation becomes samples; a cache whose identity says nothing of it left out what a template rewrites."""
ORDER_RULE = "by length within 64 shards"
"""How samples are ordered, and that a shard's forwards are those of the least padding; a cache whose identity says
nothing of it has its samples in the order of the rows."""
COMPILE_RULE = "each decoder layer by torch.compile"
"""How the target is run; a cache whose identity says nothing of it was made without."""
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
REJECTS = "rejects.parquet"
FEATURES = "features.zarr"
HIDDEN, FINAL, IDS, MASK = "hidden_states", "final", "input_ids", "loss_mask"
"""The arrays of features.zarr; a cache without `FINAL_MANIFEST` has no `final`."""
FINAL_MANTISSA_BITS = 4
"""Of final states, at least."""
ARRAYS = (HIDDEN, FINAL)
"""Those of features, each with records of its own."""
FINAL_MANIFEST, FINAL_METADATA = "final.json", f"{FEATURES}/{FINAL}/zarr.json"
FINAL_RULE = "output of the decoder after its final norm, at positions before a supervised token"
"""What `final` holds; its other positions hold fill."""
COMMITS = "commits"
TARGET = "target"
EMBEDDINGS = "embeddings.safetensors"
TMP = "tmp"
OTHER_CONTENT = "has another sha256 than when it was written"
FEATURE_KINDS = ("lossless", "rounded", "scaled")


def feature_file(array: str, shard: int) -> str:
    """Return the name in a cache of the file of a shard's hidden states, `HIDDEN`, or final ones, `FINAL`."""
    return f"{FEATURES}/{array}/c/{shard}{'/0/0' if array == HIDDEN else '/0'}"


def token_file(array: str, shard: int) -> str:
    """Return the name in a cache of the file of a shard's token ids or loss mask."""
    return f"{FEATURES}/{array}/c/{shard}"


def shard_files(shard: int, array: str = HIDDEN) -> list[str]:
    """Return the names in a cache of the files that a shard's record of this array names, that of its features first.

    The hidden states are recorded with the token ids and the mask, the final ones alone.
    """
    tokens = [token_file(IDS, shard), token_file(MASK, shard)] if array == HIDDEN else []
    return [feature_file(array, shard), *tokens]


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """How one feature is stored in sixteen bits."""

    kind: Annotated[str, Meta(pattern=r"\A(lossless|rounded|scaled)\Z")] = "lossless"
    """lossless (bfloat16), rounded (bfloat16 with fewer mantissa bits) or scaled (steps of each layer and channel)."""
    mantissa_bits: Annotated[int, Meta(ge=1, le=7)] | None = None
    """Mantissa bits kept, of rounded features."""
    step: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Step in standard deviations of the channel, of scaled features."""

    @property
    def of_final(self) -> "FeatureLayout":
        """How final states are stored in a cache of this layout: the same, or with 4 mantissa bits where that has less.

        The bytes that a coarser layout would save are few, and what it costs is the teacher's; schemas/FORMAT.md has
        the figures.
        """
        if self.kind == "lossless" or (self.mantissa_bits or 0) >= FINAL_MANTISSA_BITS:
            return self
        return FeatureLayout(kind="rounded", mantissa_bits=FINAL_MANTISSA_BITS)

    @property
    def expected_error(self) -> float:
        """Relative L2 error that the layout itself causes on normal values."""
        if self.kind == "scaled":
            return (self.step or 0) / 12**0.5
        return 0.0 if self.mantissa_bits is None else 2.0 ** -(self.mantissa_bits + 1) / 2

    def __str__(self) -> str:
        """Return the layout with its one number."""
        if self.kind == "scaled":
            return f"scaled, step {self.step:g} of a channel's standard deviation"
        return "lossless bfloat16" if self.mantissa_bits is None else f"bfloat16, {self.mantissa_bits} mantissa bits"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where features lie in the zarr arrays."""

    num_shards: Annotated[int, Meta(ge=1, lt=1_000_000)]
    """Records of finished shards are named by six digits."""
    shard_tokens: Annotated[int, Meta(ge=1, lt=1 << 29)]
    """Token slots of one shard; a multiple of `chunk_tokens`."""
    chunk_tokens: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Token slots of one inner chunk; samples start on chunk boundaries."""
    num_layers: Annotated[int, Meta(ge=1, le=4096)]
    """L, captured target layers."""
    hidden_size: Size
    """H."""
    features: FeatureLayout = FeatureLayout()

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's features before compression."""
        return 2 * self.num_layers * self.hidden_size

    @property
    def num_slots(self) -> int:
        """T, the length of each array."""
        return self.num_shards * self.shard_tokens


class StaticFile(TypedDict):
    """What is compared of a static file."""

    size: Count
    """Bytes."""
    sha256: Sha256


class _Target(TypedDict):
    dtype: str
    attn_implementation: str
    config_sha256: NotRequired[Sha256]
    weights_sha256: NotRequired[dict[str, Sha256]]
    end_ids: NotRequired[list[Index]]
    device_map: NotRequired[str | None]


class _Identity(TypedDict):
    target: _Target
    layer_ids: Annotated[list[LayerIndex], Meta(min_length=1, max_length=4096)]
    capture: str
    mask_rule: str
    layout: NotRequired[dict[str, Any]]


class _Origin(TypedDict):
    target: str
    software: dict[str, str]


class _Decoder(TypedDict):
    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=4096)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    rms_norm_eps: Annotated[float, Meta(gt=0, le=1)]
    rope_theta: Annotated[float, Meta(gt=0)]
    max_position_embeddings: Index


class _Split(TypedDict):
    conversations: Count
    samples: Count
    more_tokens: Count


class _Plan(TypedDict):
    samples: Annotated[int, Meta(ge=1, le=1 << 31)]
    tokens: Count
    supervised: Count
    anchors: Count
    mask_token_id: Index
    block_size: Annotated[int, Meta(ge=2, le=1 << 16)]
    anchor_kind: NotRequired[Literal["whole", "partial"]]
    truncated: Count
    rejects: Counts
    truncated_supervised: NotRequired[Count]
    formats: NotRequired[Counts]
    not_drawn: NotRequired[Count]
    dropped: NotRequired[Counts]
    split: NotRequired[_Split]
    answers_left_out: NotRequired[Counts]
    cpu_threads: NotRequired[Annotated[int, Meta(ge=1, le=4096)]]
    feature_bytes: NotRequired[Count]


@dataclass(frozen=True, kw_only=True)
class Sections:
    """What is read of a manifest's sections, which hold more."""

    identity: _Identity
    origin: _Origin
    decoder: _Decoder
    layout: Layout
    plan: _Plan
    files: dict[PathWithin, StaticFile]

    def __post_init__(self) -> None:
        layout, features = self.layout, self.layout.features
        numbers = (features.mantissa_bits is not None, features.step is not None)
        faults = {
            "layout.shard_tokens is no multiple of layout.chunk_tokens": layout.shard_tokens % layout.chunk_tokens,
            "layout.chunk_tokens: a chunk has 2 GiB or more": 2 * layout.chunk_tokens * layout.hidden_size >= 1 << 31,
            "layout.num_layers is not the number of identity.layer_ids": layout.num_layers
            != len(self.identity["layer_ids"]),
            "layout.num_shards is more than plan.samples": layout.num_shards > self.plan["samples"],
            "layout.hidden_size is not decoder.hidden_size": layout.hidden_size != self.decoder["hidden_size"],
            "identity.layer_ids are not layers of the decoder, ascending": [*self.identity["layer_ids"]]
            != sorted({*self.identity["layer_ids"]} & {*range(self.decoder["num_hidden_layers"])}),
            f"layout.features holds other numbers than {features.kind} features have": numbers
            != (features.kind == "rounded", features.kind == "scaled"),
        }
        if wrong := [what for what, is_wrong in faults.items() if is_wrong]:
            raise ValueError("; ".join(wrong))


def check_sections(document: dict[str, Any], path: Path) -> Sections:
    """Return the typed sections of a manifest's document; `CacheError` naming the field that is no such thing."""
    return checked(document, Sections, path)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The identity and the layout of one cache."""

    identity: dict[str, Any]
    """Every field that decides content; compared on resume."""
    origin: dict[str, Any]
    """Names, paths and software versions; recorded and shown, never compared."""
    decoder: dict[str, Any]
    """Numbers of the target's decoder that a draft's shape follows."""
    layout: Layout
    plan: dict[str, Any]
    """Totals (samples, tokens, supervised, anchors, rejects by reason), the mask token that was chosen, and the bytes
    that all shards were expected to take."""
    files: dict[str, StaticFile]
    """By path within the cache."""
    checksum: str = ""
    """Checksum of the canonical content; commit records name it."""
    array: str = HIDDEN
    """The array of features that it describes; another one than `HIDDEN` has a document of its own."""

    def to_json(self) -> dict[str, Any]:
        """Return the document of a cache without its checksum."""
        document = asdict(self)
        del document["checksum"], document["array"]
        return {"format": "dflash-cache", "format_version": FORMAT_VERSION, **document}

    @classmethod
    def read(cls, cache: Path) -> "Manifest":
        """Return the manifest of a cache folder; `CacheError` if the folder is no cache or the file is damaged."""
        path = cache / MANIFEST
        refuse_other_than_utf8(cache, "a feature cache")
        if not path.is_file():
            found = "is not a folder" if not cache.is_dir() else f"has no {MANIFEST}"
            raise CacheError(f"{cache} is not a feature cache: it {found}. Make one with `dflash extract`.")
        document = read_sealed(path)
        version = document.get("format_version")
        if document.get("format") != "dflash-cache" or version != FORMAT_VERSION:
            raise CacheError(
                f"{path} has format {document.get('format')!r} version {version!r}; this program reads "
                f"'dflash-cache' version {FORMAT_VERSION}. Extract again, or use the version that wrote it."
            )
        typed = check_sections(document, path)
        sections = {name: document[name] for name in ("identity", "origin", "decoder", "plan")}
        return cls(**sections, layout=typed.layout, files=typed.files, checksum=document["checksum"])

    def final(self, cache: Path) -> "Manifest | None":
        """Return what describes the cache's array `final`, from `FINAL_MANIFEST`; None where there is none.

        It is this manifest but for the array: one layer, the decoder's last, with a layout of its own features, and the
        document's checksum, which the records of `final` name. `CacheError` if it is damaged or of another cache.
        """
        path = cache / FINAL_MANIFEST
        if not path.exists():
            return None
        document = read_sealed(path)
        made = checked(document, FinalDocument, path)
        if (document.get("format"), document.get("format_version")) != (FINAL_FORMAT, FINAL_VERSION):
            raise unlike(path, f"format is {document.get('format')!r} version {document.get('format_version')!r}")
        if made.cache != self.checksum:
            raise CacheError(
                f"{path} belongs to the cache with manifest {made.cache}, expected {self.checksum}. Remove it, and "
                f"repeat the `dflash extract --final`."
            )
        return replace(
            self,
            identity={**self.identity, "layer_ids": [self.decoder["num_hidden_layers"] - 1], "final": made.identity},
            layout=replace(self.layout, num_layers=1, features=made.features),
            files={},
            checksum=document["checksum"],
            array=FINAL,
        )

    @property
    def by_length(self) -> bool:
        """Whether the samples are ordered by `ORDER_RULE`."""
        return is_by_length(self.identity)

    @property
    def anchor_rule(self) -> AnchorRule:
        """Which positions the plan counted as anchors."""
        return AnchorRule(int(self.plan["block_size"]), self.plan.get("anchor_kind", WHOLE))

    def static_faults(self, cache: Path, *, hashed: bool = True) -> list[tuple[str, str]]:
        """Return (file, what is wrong) for every static file whose size or, if `hashed`, sha256 is another."""
        found = {
            name: file_fault(cache / name, want["size"], want["sha256"] if hashed else None)
            for name, want in self.files.items()
        }
        return [(name, what) for name, what in found.items() if what]

    def check_static_files(self, cache: Path, *, hashed: bool = True) -> None:
        """Raise `CacheError` naming every faulty static file."""
        faults = self.static_faults(cache, hashed=hashed)
        if faults:
            listed = "; ".join(f"{name} {what}" for name, what in faults)
            raise CacheError(f"{cache} is damaged: {listed}. Restore it from a copy, or extract again.")


FINAL_FORMAT, FINAL_VERSION = "dflash-final", 1


@dataclass(frozen=True, kw_only=True)
class FinalDocument:
    """`FINAL_MANIFEST`: says that a cache has the array `final`, and how it is stored. Written once, before its shards.

    It follows from the cache and from what is asked for alone, so that whoever writes it first writes the same.
    """

    cache: Sha256
    """Checksum of the cache's manifest."""
    identity: dict[str, Any]
    """Every field that decides the array's content besides the cache's own; compared on resume."""
    features: FeatureLayout = FeatureLayout()

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return sealed_bytes({"format": FINAL_FORMAT, "format_version": FINAL_VERSION, **asdict(self)})


def is_by_length(identity: dict[str, Any]) -> bool:
    """Say whether samples and forwards of a cache of this identity are ordered by `ORDER_RULE`."""
    return "order" in identity.get("layout", {})


def is_compiled(identity: dict[str, Any]) -> bool:
    """Say whether the target's layers are compiled for a cache of this identity."""
    return "compiled" in identity


def file_fault(path: Path, size: int, sha256: str | None) -> str:
    """Return what is wrong with a file of which size and, if given, sha256 were recorded, or an empty string."""
    try:
        if not path.is_file():
            return "is missing"
        if (found := path.stat().st_size) != size:
            return f"has {found} bytes, expected {size}"
        if sha256 is not None and sha256_file(path) != sha256:
            return OTHER_CONTENT
    except OSError as error:
        if error.errno in NOT_THE_FILES:
            raise
        return f"cannot be read: {error.strerror or error}"
    return ""
