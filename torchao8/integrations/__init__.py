"""Small adapters for packages that train models. Each module needs its package; import it by name.

``torchao8.integrations.transformers``, ``.timm`` and ``.torchtitan``. Most other packages take any
optimizer and need no adapter: docs/use-with says how.
"""
