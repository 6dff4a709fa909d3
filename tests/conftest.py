import os

import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter. DeepSpeed, which accelerate
# imports where it is installed, would print a line to stdout about the missing GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"
