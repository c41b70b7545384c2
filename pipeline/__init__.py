"""What a person drives: the command line, progress, inspection, export, evaluation, demo."""
