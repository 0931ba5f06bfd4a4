"""Transfer to COCO detection: Mask R-CNN on a pre-trained encoder, its data, evaluation and figures."""
