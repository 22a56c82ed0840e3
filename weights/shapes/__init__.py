"""The embedded model and all that it was made with: data, training, detector, model card
(README.md)."""
