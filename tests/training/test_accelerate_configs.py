"""Every configuration under recipes/accelerate/ means to accelerate what its name says."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.distributed.fsdp import CPUOffloadPolicy

FOLDER = Path(__file__).resolve().parents[2] / "recipes/accelerate"
ZERO = {"zero2": (2, False), "zero2_offload": (2, True)}
ZERO |= {"zero3": (3, False), "zero3_offload": (3, True)}
FSDP = {"fsdp2": False, "fsdp2_offload": True}


def launched(name: str):
    """What `accelerate launch` makes of a file, before it starts anything."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_every_file_is_looked_at():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == {"single", "ddp", *ZERO, *FSDP}
    for path in FOLDER.glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name}")


def test_one_process_or_one_per_gpu():
    assert not launched("single").multi_gpu
    assert launched("ddp").multi_gpu


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_reads_its_stage_and_offload(name, monkeypatch):
    stage, offload = ZERO[name]
    _, env = prepare_deepspeed_cmd_env(launched(name))
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    zero = DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"])
    assert zero.stage == stage
    assert zero.offload_optimizer.device == ("cpu" if offload else "none")
    assert (zero.offload_param.device == "cpu") is (offload and stage == 3)
    assert zero.gather_16bit_weights_on_model_save is (stage == 3)
    assert plugin.zero3_init_flag is (stage == 3)
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_reads_its_version_and_offload(name, monkeypatch):
    args = launched(name)
    assert args.use_fsdp
    for variable, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.cpu_ram_efficient_loading is False
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) is FSDP[name]
