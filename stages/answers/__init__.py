"""What regenerating is made of: conversations to be answered, the journal of answers, and who answers."""
