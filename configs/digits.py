"""Handwritten digits, 8x8 tokens of 17 grey levels.

python train_ddpd.py configs/digits.py
2.7 minutes on 2 cores of an AMD EPYC. Expect planner AUROC .943, denoiser CE 1.32 nats
and a judge accuracy of 96 % at 32 steps (3 seeds, commit af32e5b).
"""
data = "digits"
image_size = 8
n_layer = 4
n_head = 2              # head width 64: narrower ones are slower on a CPU
n_embd = 128
batch_size = 64
max_iters = 800
