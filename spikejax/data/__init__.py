"""Data sets on the host: images, and the augmentation of them."""
