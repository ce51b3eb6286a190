"""CIFAR-10 at 16×16, for the configurations ``cifar10_*``: every pixel is the mean of four.

python docs/cifar10.py [--source uoft-cs/cifar10] [--blur 0] [--output data/cifar10_16]
"""

import argparse
from pathlib import Path

from datasets import DatasetDict, load_dataset
from PIL import Image, ImageFilter


def averaged(image: Image.Image, blur: float = 0) -> Image.Image:
    """An image of half the size, then blurred by a Gaussian whose standard deviation is ``blur`` pixels."""
    return image.reduce(2).filter(ImageFilter.GaussianBlur(blur))


def main() -> None:
    """Reads the data set from the Hub, or from a folder of parquet files, and saves it as arrow files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", default="uoft-cs/cifar10", help="id of the Hub, or a folder of train-*.parquet and test-*.parquet"
    )
    parser.add_argument("--blur", type=float, default=0, help="pixels, to see what a distance between images means")
    parser.add_argument("--output", default="data/cifar10_16", help="folder that --data.source names")
    args = parser.parse_args()
    if Path(args.source).is_dir():
        files = {split: f"{args.source}/{split}-*.parquet" for split in ("train", "test")}
        images = load_dataset("parquet", data_files=files)
    else:
        images = load_dataset(args.source)
    assert isinstance(images, DatasetDict)
    column = next(name for name in ("image", "img") if name in images["train"].column_names)
    images.map(lambda row: {column: averaged(row[column], args.blur)}).save_to_disk(args.output)


if __name__ == "__main__":
    main()
