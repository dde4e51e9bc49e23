"""A path through a maze of 9x9 tokens by GIDD; walls, start and goal are given.

python train_ddpd.py configs/maze_gidd.py && python sample.py out/maze_gidd
"""
data = "maze"
method = "gidd"
n_layer = 8
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 2000
