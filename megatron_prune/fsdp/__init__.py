"""The other training engine: transformers' model sharded by PyTorch's FSDP2."""
