"""How the frozen towers are run: one small protocol, several libraries behind it, chosen by name or by measuring.

    protocol.py   what a runtime is, and what a domain hands to it
    towers.py     the two encoders as functions of tensors, ready to be exported
    registry.py   the names, what each needs, and how it is opened
    selection.py  `auto`: measure once, remember, prove equality at every start

Nothing here is imported before it is needed, and none of the libraries is needed for the default, `torch`.
"""
