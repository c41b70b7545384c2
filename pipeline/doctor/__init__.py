"""What `dflash doctor` looks at and tries out."""
