"""Fashion-MNIST, 32x32 tokens of 8 grey levels, the reference network.
python data.py fashion_mnist && torchrun --nproc_per_node=NUM_GPUS train_ddpd.py configs/fashion_mnist.py
@"""
data = "fashion_mnist"
vocab = 8
grid = (32, 32)
n_classes = 10
batch_size = 32
max_iters = 20_000
