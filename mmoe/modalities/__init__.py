"""Says of each built-in modality how it is planned, encoded and laid out: one a file, loaded when it is asked for.

Preparation asks them too, in many processes: none of them imports torch, but where something is encoded.
"""
