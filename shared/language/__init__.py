"""A language model that writes: what the rewriter and the encoder's chat endpoint have in common.

Many texts are written at once, a token of each in one forward. It knows no rewriters, no `<think>` and no HTTP. Of its
modules `marks` and `options` need no package, so that a rewriter that asks another server needs no torch.
"""
