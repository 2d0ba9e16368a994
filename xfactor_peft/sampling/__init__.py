"""Text from the model: generation, contexts, scores such as R, calibration, the dial."""
