"""Inference: from image files to mask files, with a trained network and, if wanted, a refinement of its masks."""
