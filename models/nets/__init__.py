"""The networks themselves, as plain torch modules that load published weights.

This folder and ``compression/`` are the only places that import torch. Start at
:mod:`edgesight.models.nets.build`: ``build_net(name)`` and ``load_weights(net, path)``.
"""
