"""Audio files and, from them, batches."""
