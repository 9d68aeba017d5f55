"""Remote stores: push, pull and reading by range, on the Hub, in a local registry or behind a URL."""
