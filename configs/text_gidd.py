"""GIDD on bytes of any text, 128 at a time.

python data.py text --file F --name text
python train_ddpd.py configs/text_gidd.py
"""
data = "text"
vocab = 256
grid = (1, 128)
n_classes = 0
method = "gidd"
n_layer = 4
n_head = 3
n_embd = 192
batch_size = 32
max_iters = 2000
