"""What is started for a catalog entry, and on which devices."""

import os
import textwrap

import pytest

from resources.engine.catalog import ModelEntry
from resources.engine.devices import visible_devices
from resources.engine.vllm_command import cpu_environment, server_arguments, server_environment
from resources.errors import CatalogError, EngineStartFailed


def test_arguments_of_an_entry() -> None:
    entry = ModelEntry(
        name="m", source="org/model", revision="abc", aliases=("a", "b"),
        engine_args={
            "max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": False, "dtype": "float32",
            "seed": -1, "hf_overrides": {"x": 1}, "lora_modules": [{"name": "l", "path": "p"}, "n=q"],
            "middleware": ["m.A", "m.B"], "compilation_config.mode": 3, "allowed_origins": ["*"],
        },
    )  # fmt: skip
    expected = textwrap.dedent("""
        --model org/model --served-model-name m a b --revision=abc --allowed-media-domains none.invalid
        --enable-request-id-headers --disable-uvicorn-access-log --max-model-len=1024 --enforce-eager
        --no-enable-prefix-caching --dtype=float32 --seed=-1 --hf-overrides={"x":1}
        --lora-modules {"name":"l","path":"p"} n=q --middleware=m.A --middleware=m.B --compilation-config.mode=3
        --allowed-origins=["*"]
    """).split()
    assert [argument.replace(" ", "") for argument in server_arguments(entry)] == expected


def test_media_domains_of_an_entry_are_passed_on() -> None:
    arguments = server_arguments(ModelEntry(name="m", source="o/m", allowed_media_domains=("a.org", "b.org")))
    at = arguments.index("--allowed-media-domains")
    assert arguments[at + 1 : at + 3] == ["a.org", "b.org"]


@pytest.mark.parametrize("key", ["uds", "served_model_name", "port"])
def test_arguments_that_are_ours_are_refused(key: str) -> None:
    with pytest.raises(CatalogError, match="take it out"):
        server_arguments(ModelEntry(name="m", source="o/m", engine_args={key: "x"}))


def test_environment_keeps_our_secrets_and_the_entry_wins() -> None:
    ours = {
        "PATH": "/bin", "DAGSTER_POSTGRES_URL": "s", "VLLM_BATCH_DATA": "s", "OPENAI_API_KEY": "s", "VLLM_API_KEY": "s",
        "LABEL_STUDIO_TOKEN": "s", "PGPASSWORD": "s", "HF_TOKEN": "hub", "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    entry = ModelEntry(name="m", source="o/m", env={"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_API_KEY": "wanted"})
    environment = server_environment(entry, ours)
    assert "s" not in environment.values()
    assert environment["HF_TOKEN"] == "hub"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_API_KEY"] == "wanted"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert "HF_HUB_OFFLINE" not in environment
    assert server_environment(ModelEntry(name="m", source="/models/m"), {})["HF_HUB_OFFLINE"] == "1"


def test_cpu_threads_are_bound_to_the_cpus_this_process_may_use() -> None:
    cpus = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    environment = cpu_environment(ModelEntry(name="m", source="o/m"))
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cpus}


@pytest.mark.parametrize(
    ("chosen", "size", "expected"),
    [
        (None, 1, ["GPU-a", "GPU-b"]),
        (None, 2, ["GPU-a", "GPU-b"]),
        ("1", 1, ["GPU-b"]),
        ("1,0", 2, ["GPU-b", "GPU-a"]),
        ("GPU-b", 1, ["GPU-b"]),
        ("", 1, ["cpu"]),
        ("7", 1, ["cpu"]),
    ],
)
def test_devices_are_the_visible_ones_in_their_order(chosen: str | None, size: int, expected: list[str]) -> None:
    entry = ModelEntry(name="m", source="o/m", engine_args={"tensor_parallel_size": size})
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert visible_devices(entry, environ, {"0": "GPU-a", "1": "GPU-b"}) == expected


def test_too_few_devices_are_an_error_and_none_is_the_cpu() -> None:
    entry = ModelEntry(name="m", source="o/m", engine_args={"tensor-parallel-size": 3})
    with pytest.raises(EngineStartFailed, match="needs 3 GPUs; 2 are visible"):
        visible_devices(entry, {}, {"0": "GPU-a", "1": "GPU-b"})
    assert visible_devices(entry, {}, {}) == ["cpu"]
