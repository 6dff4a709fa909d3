"""Hindsight Self-Distillation (arXiv 2606.15576).

The teacher reads ``[q ; c_i ; o_i]`` with ``c_i = (a*, o_i+)``, a successful peer of the same group, else
``c_i = a*``::

    J = 1/G sum_i 1/|o_i| sum_t KL(pi(. | q, c_i, o_<t) || pi(. | q, o_<t))  +  beta KL(pi || pi_0)

With ``policy_coef`` c the loss is J + c times GRPO's clipped surrogate over the same rollouts.
"""

from hsd.methods.method import Method

METHOD = Method("hsd", demonstration="peer")
