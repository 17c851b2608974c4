"""A language model over the tokens: their perplexity."""
