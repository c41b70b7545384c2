"""What is on disk and what a user may set. Needs neither torch nor zarr."""
