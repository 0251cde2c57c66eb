"""The command line: parses and calls, nothing else. `paceline.cli.app` is the entry point."""
