"""Ways to make one set of weights out of several: pure functions of tensors, one a method.

N models, S a tensor's shape. Every function computes in the dtype it is given; callers hand over float32.
Methods that work on what was learned since a common start take deltas, model - base.
"""
