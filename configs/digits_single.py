"""DDPD from one network on digits: parameters and steps of configs/digits.py, twice as deep.

python train_ddpd.py configs/digits_single.py
python sample.py out/digits_single --schedule leap --n-steps 8 --refine 8 --k 4     16 network calls
"""
data = "digits"
image_size = 8
nets = "single"
denoiser_process = "uniform"
n_layer = 8
n_head = 2
n_embd = 128
batch_size = 64
max_iters = 800
