"""What results of `dflash eval` are made of."""
