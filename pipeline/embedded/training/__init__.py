"""How the embedded model is made: its architecture and tokenizer, packed batches, the training stages, and the evaluation."""
