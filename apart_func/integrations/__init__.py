"""APART in the trainers of other packages: one module for each, which imports it.

    from apart_func.integrations.lightning import OnePassApart, TwoPassApart      # pip install 'apart_func[lightning]'

Accelerate, the `Trainer` of transformers and timm need no module: `APART` stands in their loops as it is.
"""
