"""A video language model, from its checkpoint to answers."""
