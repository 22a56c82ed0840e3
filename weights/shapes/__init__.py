"""The embedded model and everything that it was made with: the training data, the training program,
the detector, and the model card (README.md)."""
