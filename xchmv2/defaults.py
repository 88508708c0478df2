"""Defaults that several modules share; importing them costs nothing."""

from pathlib import Path

#: The demonstration model's name, and the folder it lies in.
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
#: The published checkpoint on the Hugging Face hub.
MODEL = "facebook/dinov3-vitl16-chmv2-dpt-head"
#: Side of the window the network sees [px]: the crop size the published decoder was trained on.
TILE = 448
#: Pixels shared by neighbouring tiles.
OVERLAP = 64
#: Side of an output chunk [px] where the input's own chunks do not suit.
BLOCK = 4096
#: The input's own chunks are followed up to this side [px].
LARGEST_BLOCK = 8192
#: Normalisation of red, green and blue in the range 0 to 1 (arXiv:2603.06382).
IMAGE_MEAN = (0.420, 0.411, 0.296)
IMAGE_STD = (0.213, 0.156, 0.143)
#: Version of the way from imagery to heights: raised whenever the same input gives other heights.
ALGORITHM = 1
