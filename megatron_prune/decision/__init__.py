"""The vocabulary: targets, masks, units that stay, their records on disk, models in any of their forms."""
