"""One file for each verb of the command line, and beside it what belongs to that verb alone."""
