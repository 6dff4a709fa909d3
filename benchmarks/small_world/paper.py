"""What arXiv 2606.15576 prints, for the columns beside ours."""

# AIME-25 pass@1, Qwen3-8B, percent.
METHODS = {
    "grpo": 21.6,
    "dr_grpo": 22.5,
    "dapo": 23.7,
    "opsd": 24.4,
    "sdpo": 25.0,
    "rlsd": 25.3,
    "grpo+opsd": 25.7,
    "hsd": 28.1,
}
# Share of |A| within w tokens of tau, percent, on 512 failing rollouts of Qwen3-8B.
CREDIT_MASS = {
    "HSD": {2: 23, 4: 39, 8: 55, 16: 76, 32: 93},
    "GRPO+OPSD": {2: 11, 4: 21, 8: 31, 16: 53, 32: 79},
    "OPSD": {2: 7, 4: 13, 8: 19, 16: 36, 32: 64},
}
# AIME-25 of the ablations of HSD; a row that the paper has no number for is absent.
ABLATIONS = {
    "peer_rule": {"uniform": 28.1, "shortest": 27.8, "highest_perplexity": 26.3, "lowest_perplexity": 28.5},
    "G": {"4": 25.4, "8": 28.1, "16": 30.8},
    "reference_coef": {"0": 26.3, "0.001": 28.1, "0.01": 26.9, "0.1": 24.7},
}
