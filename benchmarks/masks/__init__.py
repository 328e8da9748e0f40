"""Single weights made zero without training: masks of every method on trained networks, in `results/masks`."""
