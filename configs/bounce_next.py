"""Video of a bouncing sprite, 8 frames of 8x8: next-frame diffusion, the future pure noise.

python train_ddpd.py configs/bounce_next.py && python sample.py out/bounce_next
"""
data = "bounce"
method = "forcing"
noise_granularity = "next"
context_frames = 2
weight = "none"
p_uniform = 0.05
denoiser_lr = 1e-3
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 8
max_iters = 4000
