"""Models: loading, sampling from and scoring with causal language models."""
