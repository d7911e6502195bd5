"""An energy head on small detectors: Penn-Fudan, BCCD and COCO128, against other second stages."""
