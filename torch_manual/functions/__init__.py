"""The hand-derived gradients: one `torch.autograd.Function` and its equations per file."""
