"""The embedded model and everything that made it: data, training, detector, card (README.md)."""
