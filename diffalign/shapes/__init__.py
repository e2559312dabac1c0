"""The shapes world: captions, pictures and a judge that cannot be fooled.

`grammar` says what a caption means, `render` draws it, `verify` judges any picture against it. Nothing here learns;
the scripts that train the small models that ship are `train*.py` and `pairs.py`, which nothing else imports.
"""
