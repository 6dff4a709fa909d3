"""The pure functions of the method run without the training stack."""

import subprocess
import sys

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"trl", "transformers", "accelerate", "datasets", "peft", "matplotlib"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import hsd.hindsight.groups, hsd.hindsight.peers, hsd.hindsight.context, hsd.hindsight.credit
import hsd.policy.body_and_head, hsd.train.update, hsd.verify, hsd.train.alarms, hsd.viewer.plots
print(hsd.hindsight.credit.coverage(0.25, 8))
"""


def test_pure_functions_need_neither_trl_nor_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 0.75 * (1 - 0.75**7)) < 1e-12


def test_the_trainer_is_exported():
    import hsd

    assert hsd.HSDTrainer.__module__ == "hsd.train.trainer" and hsd.HSDConfig.__module__ == "hsd.train.config"
