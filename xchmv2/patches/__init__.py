"""Connected patches of a mask, the same for any chunking: their areas and what lies in them."""

from xchmv2.patches.labelling import label_patches, sieve

__all__ = ["label_patches", "sieve"]
