"""Seam 2: model families, Hugging Face to megatron-core and back; what a linear and a layer are."""
