"""ImageNet, 32x32 tokens of the Cosmos DI8x8 tokenizer, the large network.

python data.py images --folder F --image-size 256 --name imagenet --tokenizer cosmos_di8x8 \\
    --encoder Cosmos-Tokenizer-DI8x8/encoder.jit
torchrun --nproc_per_node=8 train_ddpd.py configs/imagenet.py
18.9 GiB and 59 TFLOP per iteration and process, by formula; not run on a GPU yet.
"""
data = "imagenet"
vocab = 8 * 8 * 8 * 5 * 5 * 5     # the codes of that tokenizer, not 2 ** 16
grid = (32, 32)
n_classes = 1000
n_layer = 14
n_head = 6
n_embd = 768
batch_size = 16
grad_accumulation_steps = 2
max_iters = 300_000
warmup_iters = 1000
eval_interval = 5000
save_interval = 5000
