"""The language model: plain nn.Modules, their initialisation, parameter classes and FLOPs."""
