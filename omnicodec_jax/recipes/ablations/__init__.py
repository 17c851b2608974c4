"""The paper's ablations. Each has `ablate`, which changes a config, and `config`, the paper's config changed by it."""
