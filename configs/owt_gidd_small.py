"""GIDD's published recipe, small: OpenWebText, 512 GPT-2 tokens (arXiv:2503.04482).

python data.py text --file owt.txt --tokenizer gpt2.json --length 512 --name owt
torchrun --nproc_per_node=8 train_ddpd.py configs/owt_gidd_small.py --p-uniform 0.1

owt.txt is the corpus in UTF-8, gpt2.json the tokenizer.json that is published with GPT-2. For a
corpus that is tokenised already, with `indices` (n, 512) in F, replace the first line by
python data.py tokens --file F.safetensors --tokenizer gpt2.json --name owt
512 sequences per iteration on 8 GPUs.
13.2 GiB and 28.9 TFLOP per iteration and process, by formula; not run on a GPU yet.
"""
data = "owt"
vocab = 50257
grid = (1, 512)
n_classes = 0
method = "gidd"
weight = "dynamic"
clean_token_rate = 0.1         # at this vocabulary the head costs more than the blocks
n_layer = 12
n_head = 12
n_embd = 768
base_width = 768          # so that the published rate is the rate of every tensor
denoiser_lr = 5e-4
weight_decay = 0.02
batch_size = 32
grad_accumulation_steps = 2
max_iters = 500_000
warmup_iters = 10_000
eval_interval = 5000
save_interval = 5000
