"""APART in the trainers of other packages, with one module for each package, which imports it.

    from apart_func.integrations.lightning import OnePassApart, TwoPassApart           # callbacks
    from apart_func.integrations.transformers import OnePassTrainer, TwoPassTrainer    # subclasses of Trainer

Fabric, Accelerate and timm need no module: put the contexts of `APART` into their loops.
"""
