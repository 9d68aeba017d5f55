"""One file per naming scheme on disk: names in a file to an Adapter and back. No tensors, no files."""
