"""70,000 pictures of clothing in the format of MNIST (Xiao, Rasul, Vollgraf 2017).   python data.py fashion_mnist"""

from sources import mnist

MAKES_ITSELF = False
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
       "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
       "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
       "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}
CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def folder_name(how):
    return mnist.folder_name(how, "fashion_mnist")


def make(how):
    return mnist.make(how, "fashion_mnist", MIRROR, MD5, CLASSES)
