"""The variants of the draft in torch: a file each with modules, loss and drafting, found by its architecture."""
