"""What the bytes of a data file hold: decompressed streams, JSON, Parquet and Arrow, within bounds of a row."""
