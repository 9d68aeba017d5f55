"""One file per PEFT method; the file name is the method name."""
