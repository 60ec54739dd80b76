"""The TPU path: models for MaxText and back, and training, mask learning and evaluation there.

Runs in the environment of tools/setup_maxtext.sh (Python 3.12, JAX, no PyTorch). `python -m megatron_prune.maxtext`.
"""
