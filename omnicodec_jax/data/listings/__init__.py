"""Lists of audio in the formats of others: a module each, which yields entries (`data/entries.py`) of what it reads."""
