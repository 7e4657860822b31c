"""What each command does, as functions of a recipe or a run folder; nothing here parses arguments or prints."""
