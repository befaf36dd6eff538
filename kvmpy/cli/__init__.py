"""The command line: parses, prints, never decides. One module a command, imported only when that command is used."""
