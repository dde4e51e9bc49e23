"""A planner on the trunk of the denoiser of configs/mnist_32.py, which is trained first.

python train_ddpd.py configs/mnist_32_trunk.py --compile
28 minutes on one core of an AMD EPYC without bfloat16. Expect planner BCE .082 and AUROC .970 on
the denoiser's fills (2 seeds, on denoisers of 2,500 iterations).
python sample.py out/mnist_32_trunk --n-steps 16
"""
data = "mnist"
vocab = 8
grid = (32, 32)
n_classes = 10
patch = 2
n_layer = 4
n_head = 2
n_embd = 128
batch_size = 16
max_iters = 1500
nets = "trunk"
freeze_denoiser = "out/mnist_32"
