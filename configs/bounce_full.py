"""Video of a bouncing sprite, 8 frames of 8x8. One level for all frames after two given: full-sequence diffusion.
python train_ddpd.py configs/bounce_full.py && python sample.py out/bounce_full"""
data = "bounce"
method = "forcing"
level_group = "shared"
context = 2
weight = "none"
p_uniform = 0.05
denoiser_lr = 1e-3
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 8
max_iters = 4000
