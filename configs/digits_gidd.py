"""GIDD on digits: parameters and steps of configs/digits.py in one network, twice as deep.

python train_ddpd.py configs/digits_gidd.py --p-uniform 0.1 --out-dir out/digits_gidd_0.1
"""
data = "digits"
image_size = 8
method = "gidd"
n_layer = 8
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 800
