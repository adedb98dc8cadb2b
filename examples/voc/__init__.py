"""The Pascal VOC training system of Araslanov & Roth (CVPR 2020), assembled from `wsseg_layers`."""
