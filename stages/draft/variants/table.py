"""The variants by architecture."""

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.dspark import DSpark
from dflash_offline.stages.draft.variants import dflash, dflash2, dspark
from dflash_offline.stages.draft.variants.variant import TorchVariant

BASE: TorchVariant = dflash
"""What a draft of another project is trained as."""
_VARIANTS: dict[str, TorchVariant] = {
    DFlash.architecture: dflash,
    DFlash2.architecture: dflash2,
    DSpark.architecture: dspark,
}


def variant_of(config: DraftConfig) -> TorchVariant:
    """Return what a draft of this config computes."""
    return _VARIANTS[config.variant.architecture]
