"""Every configuration under recipes/accelerate/ means to accelerate what its name says."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.distributed.fsdp import CPUOffloadPolicy
from training.runs import write_run

from blocktune.training.launch_checks import save_whole

FOLDER = Path(__file__).resolve().parents[2] / "recipes/accelerate"
OFFLOAD = {
    "zero2": ("--offload_optimizer_device", "cpu"),
    "zero3": ("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu"),
    "fsdp2": ("--fsdp_offload_params", "true"),
}


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` hands to which launcher, before that starts anything."""
    seen = {}
    for launcher in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args, own=launcher: seen.update({own: args}))

    def run(name, *more):
        seen.clear()
        command = [*more, "--config_file", str(FOLDER / f"{name}.yaml"), "train.py"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        [(launcher, args)] = seen.items()
        return launcher, args

    return run


def test_every_file_is_looked_at():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == {"single", "ddp", *OFFLOAD}
    for path in FOLDER.glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name}")


def test_one_process_or_one_per_gpu(launched):
    assert launched("single")[0] == "simple_launcher"
    assert launched("ddp")[0] == "multi_gpu_launcher"


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_reads_its_stage_and_offload(name, stage, offload, launched, monkeypatch):
    launcher, args = launched(name, *OFFLOAD[name] * offload)
    assert launcher == "deepspeed_launcher"
    for variable, value in prepare_deepspeed_cmd_env(args)[1].items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    zero = DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"])
    assert zero.stage == stage
    assert zero.offload_optimizer.device == ("cpu" if offload else "none")
    assert (zero.offload_param.device == "cpu") is (offload and stage == 3)
    assert zero.gather_16bit_weights_on_model_save is (stage == 3)
    assert plugin.zero3_init_flag is (stage == 3)
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("zero3", ("--zero3_save_16bit_model", "false")),
        ("fsdp2", ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")),
    ],
)
def test_whole_weights_are_saved_whatever_the_file_says(name, parts, launched, monkeypatch):
    """Parts are the defaults of `accelerate config`."""
    _, args = launched(name, *parts)
    zero3 = name == "zero3"
    env = prepare_deepspeed_cmd_env(args)[1] if zero3 else prepare_multi_gpu_env(args)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin() if zero3 else FullyShardedDataParallelPlugin()
    state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=plugin)
    kind = DistributedType.DEEPSPEED if zero3 else DistributedType.FSDP
    save_whole(SimpleNamespace(state=state, distributed_type=kind))
    if zero3:
        zero = DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"])
        assert zero.gather_16bit_weights_on_model_save
    else:
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_on_several_machines_needs_no_hostfile(name, launched):
    machines = ("--num_machines", "2", "--num_processes", "16", "--machine_rank", "1")
    _, args = launched(name, *machines, "--main_process_ip", "10.0.0.1")
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None, "accelerate would start the other machines itself"
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_reads_its_version_and_offload_and_is_refused_on_cpus(
    offload, launched, monkeypatch, tmp_path, capsys
):
    launcher, args = launched("fsdp2", *OFFLOAD["fsdp2"] * offload)
    assert launcher == "multi_gpu_launcher"
    for variable, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.cpu_ram_efficient_loading is False
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) is offload
    recipe = FOLDER.parent / "train.py"
    monkeypatch.setattr("sys.argv", [str(recipe), "--config", str(write_run(tmp_path))])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(recipe), run_name="__main__")
    assert capsys.readouterr().err.endswith(
        "use recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml\n"
    )
