"""Mathematical operations of Mamba: tensors and scalars in, tensors out, one folder per operation.

Each operation's package holds its public function, which checks shapes and picks a backend;
`reference` is the truth, every other backend agrees with it in outputs and in all gradients.
"""
