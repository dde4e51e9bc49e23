"""Fashion-MNIST, 32x32 tokens of 8 grey levels, the reference network.

python data.py fashion_mnist
torchrun --nproc_per_node=NUM_GPUS train_ddpd.py configs/fashion_mnist.py
7.0 GiB and 11.1 TFLOP per iteration and process, by formula; not run on a GPU yet.
"""
data = "fashion_mnist"
vocab = 8
grid = (32, 32)
n_classes = 10
batch_size = 32
max_iters = 20_000
