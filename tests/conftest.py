"""One thread of torch a test process: several run at a time, and would wait for each other."""

import torch

torch.set_num_threads(1)
