"""DDPD with a uniform denoiser on digits, otherwise as configs/digits.py.

python train_ddpd.py configs/digits_uniform.py
"""
data = "digits"
image_size = 8
denoiser_process = "uniform"
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 800
