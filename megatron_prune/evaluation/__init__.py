"""Scores of a model: perplexity, lm-eval tasks, proof of zeros and equal logits."""
