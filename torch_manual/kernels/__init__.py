"""The opaque `torch.library` ops, and which implementation serves which device."""
