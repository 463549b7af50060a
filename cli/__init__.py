"""The `pdengine` command: parse, call, print."""
