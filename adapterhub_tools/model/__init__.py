"""What things are: descriptions without tensors."""
