"""The fused Gumbel mask, the second-order solver, selection: tensors in, tensors out."""
