"""Evaluation: masks against the ground truth, and the tables of the results."""
