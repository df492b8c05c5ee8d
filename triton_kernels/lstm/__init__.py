"""The LSTM recurrence on a GPU, in four levels that differ only in how they move data.

    pointwise.py                L0  gate math in one launch per step, around torch's products
    tangent.py                  L0  the same for the second order
    sequence.py                 L1  the whole sequence in one program per 16 sequences
    step.py, step_backward.py   L2  one fused step per launch; L3 all steps in one launch
    gates.py                        the equations, which every level calls

torch_manual/kernels/triton.py prepares the arguments and triton_levels.py chooses;
docs/gpu_kernels.md tells the whole story.
"""
