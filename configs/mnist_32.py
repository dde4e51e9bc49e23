"""MNIST, 32x32 tokens of 8 grey levels.

python data.py mnist
python train_ddpd.py configs/mnist_32.py
"""
data = "mnist"
vocab = 8
grid = (32, 32)
n_classes = 10
patch = 2
n_layer = 4
n_head = 2              # head width 64: narrower ones are slower on a CPU
n_embd = 128
batch_size = 16
max_iters = 5000
eval_interval = 500
