"""GIDD on the faces: parameters and steps of configs/avatars.py in one network, twice as deep.

python train_ddpd.py configs/avatars_gidd.py --compile
"""
data = "avatars"
method = "gidd"
p_uniform = 0.2         # the better of .1 and .2 on digits and text
patch = 2
n_layer = 8
n_head = 3
n_embd = 192
batch_size = 16
max_iters = 8000
