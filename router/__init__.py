"""The front door: worker registry, placement, request ledger, and text to tokens and back."""
