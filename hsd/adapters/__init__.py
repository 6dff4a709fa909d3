"""Adapters of `fused_hsd_kl` to other people's code. Each module stands alone: import the one you need.

`.trl`, `.trl_context`, `.opsd`, `.packed` (lasgroup/SDPO, verl), `.verl`, `.liger`, `.cce`, `.transformers`;
docs/adapters/.
"""
