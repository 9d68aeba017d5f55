"""The command line: one module for each command, none of them loaded before it runs."""
