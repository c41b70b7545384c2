"""What `dflash inspect` finds in a cache, a run or a row of data, and how it prints that."""
