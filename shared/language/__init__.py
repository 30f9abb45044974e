"""A language model that writes: what rewriter, vl and the encoder's chat endpoint have in common.

Many texts are written at once, a token of each in one forward. It knows no HTTP. Of its modules `marks`, `options`,
`thinking` and `defaults` need no tensors, so that a rewriter that asks another server needs no torch.
"""
