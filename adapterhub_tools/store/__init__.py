"""Bytes: strict readers, content digests, and folders that appear whole or not at all."""
