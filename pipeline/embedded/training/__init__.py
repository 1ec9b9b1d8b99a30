"""How the embedded model is made: architecture, tokenizer, packed batches, training stages, evaluation."""
