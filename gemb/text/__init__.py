"""The text side of the data flow: records, rendered prompts, token ids, token-budget batches. No torch."""
