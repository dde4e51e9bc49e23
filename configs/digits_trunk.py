"""A planner on the trunk of the denoiser of configs/digits.py, which is trained first.

python train_ddpd.py configs/digits_trunk.py
"""
data = "digits"
image_size = 8
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 800
nets = "trunk"
freeze_denoiser = "out/digits"
