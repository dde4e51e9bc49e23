"""A path through a maze of 9x9 tokens by Diffusion Forcing, a noise level for each token.

python train_ddpd.py configs/maze_forcing.py && python sample.py out/maze_forcing
"""
data = "maze"
method = "forcing"
noise_granularity = "token"
weight = "none"
n_layer = 8
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 2000
