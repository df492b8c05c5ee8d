"""The `nn.Module`s: parameters, argument checks, layers and directions. No mathematics."""
