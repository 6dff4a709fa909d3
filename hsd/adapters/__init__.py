"""Adapters of `fused_hsd_kl` to other people's code. Each module stands alone: import the one you need.

`hsd.adapters.trl`, `.opsd`, `.packed` (lasgroup/SDPO, verl), `.liger`, `.cce`, `.transformers`; docs/adapters/.
"""
