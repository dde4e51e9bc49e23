"""MNIST, 32x32 tokens of 8 grey levels.

python data.py mnist
python train_ddpd.py configs/mnist_32.py --compile
19 minutes on 2 busy cores of an AMD EPYC, 14 on quiet ones; without --compile, which needs a C++
compiler, 1.6 times that. On the 9,000 digits of the t10k files expect planner AUROC .972, denoiser
CE .239 nats and .30 bits per token (1 seed, commit ebc6659).
"""
data = "mnist"
vocab = 8
grid = (32, 32)
n_classes = 10
patch = 2
n_layer = 4
n_head = 2              # head width 64: narrower ones are slower on a CPU
n_embd = 128
batch_size = 16
max_iters = 5000
eval_interval = 500
