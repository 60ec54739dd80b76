"""What learning methods pull: the loop, sessions, losses, masks of weights and units, LoRA."""
