"""manifest.json: what made a cache and how it is laid out; written once, before the first shard."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import NOT_THE_FILES, sha256_file
from dflash_offline.schemas.paths import refuse_other_than_utf8
from dflash_offline.schemas.sealed import read_sealed

FORMAT_VERSION = 2
CAPTURE_RULE = "output of decoder layer i, before any final norm"
HISTORY_RULE = "as served, a sample an answer where the template rewrites it"
"""How a conversation becomes samples; a cache whose identity says nothing of it left out what a template rewrites."""
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
REJECTS = "rejects.parquet"
FEATURES = "features.zarr"
HIDDEN, IDS, MASK = "hidden_states", "input_ids", "loss_mask"
"""The arrays of features.zarr."""
COMMITS = "commits"
TARGET = "target"
EMBEDDINGS = "embeddings.safetensors"
TMP = "tmp"
OTHER_CONTENT = "has another sha256 than when it was written"
FEATURE_KINDS = ("lossless", "rounded", "scaled")


def hidden_file(shard: int) -> str:
    """Return the name in a cache of the file of a shard's hidden states."""
    return f"{FEATURES}/{HIDDEN}/c/{shard}/0/0"


def token_file(array: str, shard: int) -> str:
    """Return the name in a cache of the file of a shard's token ids or loss mask."""
    return f"{FEATURES}/{array}/c/{shard}"


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """How one feature is stored in sixteen bits."""

    kind: str = "lossless"
    """lossless (bfloat16), rounded (bfloat16 with fewer mantissa bits) or scaled (steps of each layer and channel)."""
    mantissa_bits: int | None = None
    """Mantissa bits kept, of rounded features."""
    step: float | None = None
    """Step in standard deviations of the channel, of scaled features."""

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

    num_shards: int
    shard_tokens: int
    """Token slots of one shard; a multiple of `chunk_tokens`."""
    chunk_tokens: int
    """Token slots of one inner chunk; samples start on chunk boundaries."""
    num_layers: int
    """L, captured target layers."""
    hidden_size: int
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
    files: dict[str, dict[str, Any]]
    """Size and sha256 of every static file, by path within the cache."""
    checksum: str = ""
    """Checksum of the canonical content; commit records name it."""

    def to_json(self) -> dict[str, Any]:
        """Return the document without its checksum."""
        document = asdict(self)
        del document["checksum"]
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
        return cls(
            identity=document["identity"],
            origin=document["origin"],
            decoder=document["decoder"],
            layout=Layout(**document["layout"] | {"features": FeatureLayout(**document["layout"]["features"])}),
            plan=document["plan"],
            files=document["files"],
            checksum=document["checksum"],
        )

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
