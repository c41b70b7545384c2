"""What `dflash doctor` looks at, tries out and prints."""
