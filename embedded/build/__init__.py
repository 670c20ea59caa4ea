"""Makes the embedded models: emoji drawings in, a text-to-image model and its two judges out.

`python -m embedded.build` (or `make embedded`) runs every stage that is not finished; see `__main__`.
"""
