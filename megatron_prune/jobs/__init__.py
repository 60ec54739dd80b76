"""Work that takes more than one room: a model is opened, pruned or trained in a run folder, and left to go on."""
