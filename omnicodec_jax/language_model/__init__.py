"""A language model that is trained on tokens, and the perplexity that it reaches."""
