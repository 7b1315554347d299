"""Token merging on the exported graph: where it is possible, what it writes, and its proof.

ToMe (Bolya et al., arXiv 2210.09461) merges the most alike tokens of a Vision Transformer after every attention. Here
the graph itself is changed: tokens are followed to whatever reads them, and every sum over tokens learns their sizes.
"""
