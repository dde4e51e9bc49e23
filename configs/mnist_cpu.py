"""MNIST at 16x16 tokens of 8 grey levels, for a CPU.   python train_ddpd.py configs/mnist_cpu.py
The data first: python data.py mnist --image-size 16"""
data = "mnist"
image_size = 16
vocab = 8
grid = (16, 16)
n_classes = 10
n_layer = 4
n_head = 2              # head width 64: narrower ones are slower on a CPU
n_embd = 128
batch_size = 32
max_iters = 2600
eval_interval = 400
