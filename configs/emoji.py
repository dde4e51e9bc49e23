"""64x64 emoji as 16x16 tokens of a tokenizer of their own, in patches of 2x2.

python tokenizer.py --folder emoji --group-by _
python data.py images --folder emoji --group-by _ --image-size 64 --encoder tok/emoji/encoder.jit
python train_ddpd.py configs/emoji.py --compile
python sample.py out/emoji --sampler confidence --guidance 2
10.4 minutes for the tokenizer and 9.7 for the model on one core of an AMD EPYC. Expect 26.8 dB,
planner AUROC .934, denoiser CE 2.73 nats (1 seed).
"""
data = "emoji"
patch = 2
n_layer = 4
n_head = 3              # head width 64: narrower ones are slower on a CPU
n_embd = 192
batch_size = 16
max_iters = 5000
eval_interval = 1000
