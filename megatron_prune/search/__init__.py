"""What searching methods pull: levels of a layer, evolution, the integer program."""
