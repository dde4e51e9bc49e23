"""A planner on the trunk of the denoiser of configs/avatars.py, which is trained first.

python train_ddpd.py configs/avatars_trunk.py --compile
6 minutes on one core of an AMD EPYC; --compile needs a C++ compiler. Expect planner BCE .108 and
AUROC .943 on the denoiser's fills (2 seeds).
"""
data = "avatars"
patch = 2
n_layer = 4
n_head = 3
n_embd = 192
batch_size = 32
max_iters = 1500
nets = "trunk"
freeze_denoiser = "out/avatars"
