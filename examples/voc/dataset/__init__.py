"""Data sets in Pascal VOC's folder layout: names, images, masks, labels, splits; SBD's masks; the drawn toy set."""
