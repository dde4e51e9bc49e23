"""A planner on the trunk of the denoiser of configs/maze_ddpd.py, which is trained first.

python train_ddpd.py configs/maze_trunk.py
python sample.py out/maze_trunk --n-steps 16 --noise 1
"""
data = "maze"
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 1500
nets = "trunk"
freeze_denoiser = "out/maze_ddpd"
