"""Pixel-art faces, 16x16 tokens of 96 colours, in patches of 2x2.

python train_ddpd.py configs/avatars.py
Not measured yet.
"""
data = "avatars"
patch = 2
n_layer = 4
n_head = 3              # head width 64: narrower ones are slower on a CPU
n_embd = 192
batch_size = 64
max_iters = 700
