"""MNIST at 16x16 tokens of 8 grey levels, for a CPU.

python data.py mnist --image-size 16
python train_ddpd.py configs/mnist_cpu.py
24 minutes on 2 cores of an Intel Xeon with AMX, extrapolated from 30 iterations; one run took 54
minutes on a busy core. 0.2 GiB. On the 9,000 digits of the t10k files expect planner AUROC .965,
denoiser CE .394 nats and .51 bits per token (1 seed, commit 23c198a).
"""
data = "mnist"
image_size = 16
vocab = 8
grid = (16, 16)
n_classes = 10
n_layer = 4
n_head = 2              # head width 64: narrower ones are slower on a CPU
n_embd = 128
batch_size = 32
max_iters = 2600
eval_interval = 400
