"""One file per way to combine several deltas into one; the folder is the registry (``registry.py``)."""
