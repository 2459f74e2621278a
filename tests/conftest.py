"""What holds for all tests: one thread of torch a process, and Ctrl-C as a terminal sends it."""

import signal

import torch

torch.set_num_threads(1)  # several processes run at a time, and would wait for each other
# started in the background a shell lets it be ignored, and so do all processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
