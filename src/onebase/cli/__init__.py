"""The command line: talks to people, and does no work of its own."""
