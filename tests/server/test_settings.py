"""The environment in, Settings or every problem out."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatterbox_server.settings import Settings, SettingsError


def test_an_empty_environment_means_every_default() -> None:
    assert Settings.from_environ({}) == Settings()


def test_every_variable_of_the_contract_is_read() -> None:
    settings = Settings.from_environ(
        {
            "CHATTERBOX_INSTANCE": "gpu2-gpu3",
            "CHATTERBOX_HOST": "::1",
            "CHATTERBOX_PORT": "6098",
            "CHATTERBOX_ENGINE": "stock",
            "CHATTERBOX_MODEL": "turbo",
            "CHATTERBOX_DEVICE": "cuda",
            "CHATTERBOX_WEIGHTS": "/srv/weights",
            "CHATTERBOX_TF32": "false",
            "CHATTERBOX_CUDNN_BENCHMARK": "false",
            "CHATTERBOX_AUTOCAST": "bf16",
            "CHATTERBOX_PIPELINE": "on",
            "CHATTERBOX_VOICES_DIR": "/srv/voices",
            "CHATTERBOX_QUEUE_SIZE": "0",
            "CHATTERBOX_MAX_WAIT_S": "5",
            "CHATTERBOX_LONGEST_UTTERANCE_S": "3600",
            "CHATTERBOX_MAX_INPUT_CHARS": "5000",
            "CHATTERBOX_ORDER": "fifo",
            "CHATTERBOX_CHECK_DURATION": "false",
            "CHATTERBOX_ALIASES": "alloy=anna, nova=bob",
            "CHATTERBOX_MAX_UPLOAD_MB": "50",
            "CHATTERBOX_API_KEYS_FILE": "/run/credentials/x/api-keys",
            "CHATTERBOX_CORS_ORIGINS": "https://chat.example, http://[::1]:3000",
            "CHATTERBOX_RECYCLE_GPU_MB": "256",
            "CHATTERBOX_RECYCLE_HOST_MB": "0",
            "CHATTERBOX_RESULTS_DIR": "/srv/results",
            "CUDA_VISIBLE_DEVICES": "2, GPU-8f3c2a1b",
            "INVOCATION_ID": "abc",
            "RUNTIME_DIRECTORY": "/run/chatterbox-tts-gpu0:/run/other",
            "NOTIFY_SOCKET": "/run/systemd/notify",
            "PATH": "/usr/bin",
        }
    )

    assert settings == Settings(
        instance="gpu2-gpu3",
        host="::1",
        port=6098,
        model="turbo",
        weights=Path("/srv/weights"),
        tf32=False,
        cudnn_benchmark=False,
        autocast="bf16",
        pipeline="on",
        voices_dir=Path("/srv/voices"),
        queue_size=0,
        max_wait_s=5,
        longest_utterance_s=3600,
        max_input_chars=5000,
        order="fifo",
        check_duration=False,
        aliases={"alloy": "anna", "nova": "bob"},
        max_upload_mb=50,
        api_keys_file=Path("/run/credentials/x/api-keys"),
        cors_origins=("https://chat.example", "http://[::1]:3000"),
        recycle_gpu_mb=256,
        recycle_host_mb=0,
        results_dir=Path("/srv/results"),
        visible_gpus=("2", "GPU-8f3c2a1b"),
        invocation_id="abc",
        runtime_dir=Path("/run/chatterbox-tts-gpu0"),
    )


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        Settings.from_environ(
            {"CHATTERBOX_PROT": "6093", "CHATTERBOX_PORT": "http", "CHATTERBOX_TF32": "yes", "CHATTERBOX_ZZZ": ""}
        )

    assert (
        str(told.value)
        == """
cannot start: the environment has 4 problems
  CHATTERBOX_PORT: input should be a valid integer, unable to parse string as an integer, got 'http'
  CHATTERBOX_PROT: unknown name (did you mean 'CHATTERBOX_PORT'?)
  CHATTERBOX_TF32: input should be 'true' or 'false', got 'yes'
  CHATTERBOX_ZZZ: unknown name
"""[1:-1]
    )


PAIRS = "input should be ALIAS=VOICE, with commas between; names are 1 to 64 letters, digits, '_' and '-'"
ORIGIN = "input should be '*' or like 'https://example.com' or 'http://localhost:3000': lower case, no path"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("INSTANCE", "GPU 0", "string should match pattern '^[a-z0-9-]+$', got 'GPU 0'"),
        ("HOST", "localhost", "input should be an IP address, got 'localhost'"),
        ("PORT", "0", "input should be greater than or equal to 1, got '0'"),
        ("PORT", "65536", "input should be less than or equal to 65535, got '65536'"),
        ("ENGINE", "quick", "input should be 'stock', 'fast' or 'espeak', got 'quick'"),
        ("MODEL", "nano", "input should be 'chatterbox', 'turbo' or 'multilingual', got 'nano'"),
        ("DEVICE", "cuda:1", "input should be 'cuda' or 'cpu', got 'cuda:1'"),
        ("WEIGHTS", "weights", "input should be an absolute path, got 'weights'"),
        ("AUTOCAST", "fp8", "input should be 'off', 'fp16' or 'bf16', got 'fp8'"),
        ("VOICES_DIR", "", "input should be an absolute path, got ''"),
        ("QUEUE_SIZE", "1001", "input should be less than or equal to 1000, got '1001'"),
        ("MAX_WAIT_S", "0", "input should be greater than or equal to 1, got '0'"),
        ("MAX_INPUT_CHARS", "1000001", "input should be less than or equal to 1000000, got '1000001'"),
        ("ORDER", "lifo", "input should be 'size' or 'fifo', got 'lifo'"),
        ("CHECK_DURATION", "1", "input should be 'true' or 'false', got '1'"),
        ("ALIASES", "alloy", f"{PAIRS}, got 'alloy'"),
        ("ALIASES", "alloy=an na", f"{PAIRS}, got 'alloy=an na'"),
        ("ALIASES", "alloy=../anna", f"{PAIRS}, got 'alloy=../anna'"),
        ("ALIASES", "alloy=a=b", f"{PAIRS}, got 'alloy=a=b'"),
        ("ALIASES", "alloy=anna,alloy=bob", "input should name 'alloy' once, got 'alloy=anna,alloy=bob'"),
        ("MAX_UPLOAD_MB", "0", "input should be greater than or equal to 1, got '0'"),
        ("API_KEYS_FILE", "keys", "input should be an absolute path, got 'keys'"),
        ("CORS_ORIGINS", "chat.example", f"{ORIGIN}, got 'chat.example'"),
        ("CORS_ORIGINS", "*,https://chat.example/", f"{ORIGIN}, got 'https://chat.example/'"),
        ("CORS_ORIGINS", "https://Chat.example", f"{ORIGIN}, got 'https://Chat.example'"),
        ("CORS_ORIGINS", "ftp://chat.example", f"{ORIGIN}, got 'ftp://chat.example'"),
        ("RECYCLE_GPU_MB", "255", "input should be 0 (never) or at least 256, got '255'"),
        ("RECYCLE_HOST_MB", "10000001", "input should be less than or equal to 10000000, got '10000001'"),
        ("RESULTS_DIR", "results", "input should be an absolute path, got 'results'"),
        ("RUNTIME_DIR", "/run/x", "unknown name"),
        ("port", "6093", "unknown name (did you mean 'CHATTERBOX_PORT'?)"),
        ("VISIBLE_GPUS", "0", "unknown name"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: str, problem: str) -> None:
    with pytest.raises(SettingsError) as told:
        Settings.from_environ({f"CHATTERBOX_{name}": value})

    assert told.value.problems == (f"CHATTERBOX_{name}: {problem}",)


def test_settings_cannot_be_changed_once_they_are_read() -> None:
    told = {"alloy": "anna"}
    settings = Settings(aliases=told)
    told["alloy"] = "eve"

    assert settings.aliases == {"alloy": "anna"}
    assert not hasattr(settings.aliases, "__setitem__")


def test_autocast_is_refused_without_cuda() -> None:
    with pytest.raises(SettingsError, match="input should be 'off' where CHATTERBOX_DEVICE is 'cpu', got 'bf16'"):
        Settings.from_environ({"CHATTERBOX_DEVICE": "cpu", "CHATTERBOX_AUTOCAST": "bf16"})


names = st.sampled_from(sorted(Settings.model_fields)).map(lambda field: f"CHATTERBOX_{field.upper()}")


@example(environ={"CHATTERBOX_CORS_ORIGINS": "0,0"})
@given(environ=st.dictionaries(names | st.text().map("CHATTERBOX_".__add__), st.text()))
def test_any_environment_is_settings_or_a_clean_error(environ: dict[str, str]) -> None:
    try:
        Settings.from_environ(environ)
    except SettingsError as error:
        assert all(problem.startswith(tuple(environ)) for problem in error.problems)  # noqa: PT017 (either is fine)
