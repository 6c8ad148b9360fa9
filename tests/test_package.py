"""What `import r1v_rl` gives, and what it does not cost."""

import subprocess
import sys

import pytest

import r1v_rl


def test_the_names_users_import():
    from r1v_rl import GRPOConfig, GRPOTrainer, compose_vlm

    assert GRPOTrainer.__name__ == "GRPOTrainer" and GRPOConfig.__name__ == "GRPOConfig" and callable(compose_vlm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        r1v_rl.Trainer  # noqa: B018


def test_import_alone_brings_no_torch():
    code = "import r1v_rl, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
