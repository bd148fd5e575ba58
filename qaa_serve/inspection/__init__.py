"""What an adapter is: its parts and sizes, its circuits drawn and exported, what it does on noisy hardware.

Behind ``qaa-serve inspect``. Nothing heavy is imported before it is needed.
"""
