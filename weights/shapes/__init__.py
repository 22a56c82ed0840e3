"""The embedded model and all that it was made with: training data, training program, detector, and
model card (README.md)."""
