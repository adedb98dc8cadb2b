"""Inference: from image files to mask files, with a trained network and an optional refinement of its masks."""
