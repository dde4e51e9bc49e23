"""A path through a maze of 9x9 tokens by planner and denoiser; walls, start and goal are given.

python train_ddpd.py configs/maze_ddpd.py && python sample.py out/maze_ddpd
"""
data = "maze"
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 2000
