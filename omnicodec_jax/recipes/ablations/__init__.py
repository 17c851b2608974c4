"""The paper's ablations: each has `ablate`, which changes a config, and `config`, the paper's changed so."""
