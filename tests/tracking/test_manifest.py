"""The run manifest says what was made, from what, with which versions, and holds no secret."""

import json

from r1v_rl.checkpoints import file_sha256
from r1v_rl.tracking.manifest import versions, write_run_manifest


def write(output_dir, **changes):
    values = dict(  # noqa: C408
        stage="grpo",
        parent=None,
        config={"learning_rate": 1e-6},
        data_hash="d",
        weight_hashes={"model": "w"},
        seeds={"seed": 1},
        metrics={"accuracy": float("nan")},
    )
    return json.loads(write_run_manifest(output_dir, **(values | changes)).read_text())


def test_a_chain_is_linked_by_hash(tmp_path):
    first = write(tmp_path / "align", stage="align")
    second = write(tmp_path / "grpo", parent=tmp_path / "align")
    assert first["parent"] is None and first["metrics"] == {"accuracy": None}
    assert second["parent"] == {
        "path": str(tmp_path / "align"),
        "manifest_sha256": file_sha256(tmp_path / "align" / "manifest.json"),
    }
    assert write(tmp_path / "x", parent="org/model")["parent"] == {"path": "org/model", "manifest_sha256": None}
    assert second["config"] == {"learning_rate": 1e-6} and second["weight_hashes"] == {"model": "w"}


def test_versions_are_those_that_run():
    import torch
    import transformers

    found = versions()
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    assert found["trl"] and found["vllm"]


def test_no_secret_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary12345")
    write(tmp_path, config={"hub_token": "hf_canary12345", "num_memory_tokens": 4, "url": "https://u:pw@host"})
    text = (tmp_path / "manifest.json").read_text()
    assert "canary" not in text and "u:pw" not in text and '"num_memory_tokens": 4' in text
