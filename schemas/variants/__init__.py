"""What a draft may have beyond the parts that all drafts share: a file each, found by its architecture."""
