"""70,000 images of clothing in the format of MNIST (Xiao, Rasul, Vollgraf 2017).

python data.py fashion_mnist [--folder F] [--image-size S] [--grey-levels L]
"""

from sources import mnist

MAKES_ITSELF = False
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
]


def folder_name(options) -> str:
    return mnist.folder_name(options, "fashion_mnist")


def make(options) -> tuple[dict, list]:
    return mnist.make(options, "fashion_mnist", MIRROR, MD5, CLASSES)
