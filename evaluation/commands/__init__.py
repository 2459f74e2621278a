"""`maskbank evaluate …`: one file a command."""
