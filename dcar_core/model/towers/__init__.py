"""Towers: the text and image encoders of every CLIP family behind one protocol that takes prompts.

In: open_clip's model and its tokenizer. Out: towers that encode tokens and pixels, with or without prompt rows.
`model.backbone`, `model.catalogue`, `encoder` and the CLI import it; nothing else does.
"""
