"""Inference: from image files to mask files, with a trained network and, if wanted, a dense CRF."""
