"""DDPD with a mask denoiser on digits: configs/digits.py under the name that tables give it.
python train_ddpd.py configs/digits_maskd.py"""
data = "digits"
image_size = 8
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 800
