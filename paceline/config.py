"""Settings: frozen, typed, checked at the edge, unknown keys refused.

The same tree is the `args:` of the application in a Ray Serve config (`deployments/*.yaml`), the input of
`paceline.serving.app:build` and, for its `engine` part, the keyword arguments of `paceline.LLM`. "auto" is
resolved by whoever knows the answer (the engine, at load time) into a new object that is logged once.
This module is the only place that reads environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from paceline.config_autoscaling import AutoscalingSettings as AutoscalingSettings
from paceline.config_autoscaling import ReplicaRange
from paceline.config_base import Auto, CustomResources, Positive, Settings
from paceline.config_security import ApiKeySettings as ApiKeySettings
from paceline.config_security import DraftSecurity as DraftSecurity
from paceline.config_security import LimitSettings as LimitSettings
from paceline.config_telemetry import TelemetrySettings as TelemetrySettings
from paceline.errors import ConfigError, InvalidRequest
from paceline.ports import is_loopback
from paceline.sessions.window import DEFAULT_N_KEEP, HALF, StreamingWindow

Milliseconds = Annotated[float, Field(gt=0, le=600_000)]
SchedulingPolicy = Literal["fcfs", "priority"]
AttnImplementation = Literal["auto", "triton", "flash_attention_3", "varlen_attn", "flash_attention_2", "sdpa", "eager"]
ComputeDtype = Literal["auto", "int16", "int8", "fp32", "bf16"]
WeightDtype = Literal["auto", "int8", "int4"]
Collectives = Literal["auto", "shm", "gloo", "peer", "nccl"]
Quantization = Literal["none", "bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8", "torchao_int4", "torchao_fp8"]

DEFAULT_MODEL, DEFAULT_DRAFT = "smollm2-135m", "smollm2-135m-draft"
APP_NAME = "paceline"
IMPORT_PATH = "paceline.serving.app:build"


class EngineSettings(Settings):
    """How one model runs in one replica (or in `paceline.LLM`)."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto takes a GPU if one is visible."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of activations, and of KV unless kv_dtype says otherwise; auto is float32 on a CPU, the "
        "checkpoint's type on a GPU.",
    )
    linear_backend: Literal["auto", "torch", "fbgemm_fp16", "bf16"] = Field(
        "auto",
        description="Matrix products on a CPU. auto measures at load time and takes, layer by layer, the fastest that "
        "changes no weight of the checkpoint: float32 (torch), half precision (fbgemm_fp16), or 8 or 4 bits in groups "
        "of 32 where the weights lie on such a grid, as those of GGUF's Q8_0, Q4_0 and Q4_1 and of GPTQ and AWQ do. A "
        "named one rounds the weights to what it stores; bf16 rounds activations too.",
    )
    weight_dtype: WeightDtype = Field(
        "auto",
        description="What weights are rounded to, to nearest. On a CPU each group has its own scale; those that lie "
        "on such a grid already stay as they are. On a GPU int8 alone, with a scale for each output, for models built "
        "like Llama. int4 leaves the output head 8 bits, since in 4 it alone would cost "
        "more quality than all layers; an embedding tied to a head that is rounded is looked up there, if the model is "
        "built like Llama. auto rounds nothing.",
    )
    group_size: Literal[32, 128] = Field(
        32,
        description="Consecutive inputs that share a scale where weights are rounded: by weight_dtype, or by "
        "torchao_int4.",
    )
    compute_dtype: ComputeDtype = Field(
        "auto",
        description="What activations are rounded to where weights of 8 or 4 bits multiply them on a CPU, in groups of "
        "32. int16 loses nothing that can be measured. int8 is up to 1.7 times as fast with several rows in a step "
        "(windows to verify, prompts, many streams) and costs about as much quality as 8-bit weights do. fp32 rounds "
        "nothing and bf16 leaves the bits of a bfloat16; both multiply in float32, slower than int16. auto is int8 "
        "for a draft that was distilled, which changes no output, else int16.",
    )
    quantization: Quantization = Field(
        "none",
        description="Round the weights of a checkpoint as a library does it, when it is loaded: bitsandbytes (GPU or "
        "CPU), or torchao (int8 GPU or CPU; int4 and fp8 GPU, in bfloat16). bitsandbytes_8bit and torchao_fp8 round "
        "activations too. Checkpoints that are quantized already (GPTQ, AWQ, compressed-tensors, …) need none.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="The 16 values of bitsandbytes_4bit: those of a normal distribution, or a float's."
    )
    bnb_4bit_use_double_quant: bool = Field(
        False, description="bitsandbytes_4bit rounds its scales too, and saves 0.4 bits a weight."
    )
    device_map: Literal["none", "auto"] = Field(
        "none",
        description="auto is for a model that is larger than one device: its layers go to the GPUs that are visible, "
        "then to host memory, then to disk, as far as each has room beside its KV cache, and run by Transformers' own "
        "code. What is not on a GPU is brought there for each step, which takes its bytes over the bus's or the disk's "
        "bandwidth.",
    )
    offload_folder: str | None = Field(
        None,
        description="Folder for weights that device_map: auto leaves on disk and that the checkpoint's files do not "
        "hold as they are. null is a temporary one.",
    )
    threads: Positive | Auto = Field(
        "auto",
        description="Threads of one replica, or of each rank; auto is the cores this process may use, of several ranks "
        "on one machine each one's share.",
    )
    tensor_parallel_size: Positive = Field(
        1,
        description="Ranks that share one replica's model: processes, each on a GPU or a CPU socket of its own, each "
        "with a part of the heads and of the width of every layer.",
    )
    collectives: Collectives = Field(
        "auto",
        description="How ranks sum what they computed. shm: our kernel in memory that CPU ranks of one host share; "
        "gloo: TCP. peer: our kernel over NVLink for short steps, NCCL for long ones; nccl: NCCL alone. auto takes shm "
        "on a CPU and peer on GPUs where they run, else gloo and nccl.",
    )
    collective_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="A rank that waits so long for another gives up: the replica ends and is built anew."
    )
    numa_bind: bool = Field(
        True,
        description="Bind each rank's threads and memory to a NUMA node of its own, if the machine has as many nodes.",
    )
    cores_per_rank: Positive | Auto = Field(
        "auto", description="Cores that a rank is bound to; auto is all of its NUMA node."
    )
    max_model_len: Positive | Auto = Field(
        "auto", description="Longest prompt plus output, in tokens; auto is the model's own."
    )
    kv_tokens: Positive | Auto = Field(
        "auto",
        description="KV cache in tokens, running and idle sessions together; auto is a quarter of a machine's "
        "free memory, or 0.8 of a GPU's.",
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Type the KV cache stores; auto is the activations'. int8, with a scale for each key and value of "
        "a head, takes about a quarter of float32 or half of bfloat16, and rounds: the output is another, if hardly "
        "worse.",
    )
    cache_implementation: Literal["auto", "static", "paged"] = Field(
        "auto",
        description="How the KV cache is laid out. paged: blocks of 64 tokens of one pool, on a GPU. static: memory "
        "for max_model_len tokens for each sequence at once; on a CPU its pages are committed when they are written. "
        "auto is paged where an attention kernel reads blocks, else static.",
    )
    attn_implementation: AttnImplementation = Field(
        "auto",
        description="Attention kernel, by Transformers' names where it has one. auto: our own on a CPU if the model is "
        "built like Llama; on a GPU our Triton kernel, and FlashAttention for prompts. sdpa and eager are PyTorch's, "
        "sequence by sequence; flash_attention_2 is the one PyTorch brings; flash_attention_3 and varlen_attn (PyTorch "
        "2.13) read blocks, where they are installed.",
    )
    compile: bool = Field(
        True,
        description="On a GPU: fuse what a layer does around its products, if the model is built like Llama, and "
        "capture short steps as CUDA graphs. false runs the model's own code step by step.",
    )
    max_num_seqs: Positive = Field(16, description="Sequences in one step.")
    max_batched_tokens: Positive = Field(512, description="Tokens in one step; longer prompts are prefilled in chunks.")
    max_prefill_tokens_while_decoding: Positive | Auto = Field(
        "auto",
        description="Prompt tokens in a step in which a stream runs, so that long prompts do not stall it; "
        "auto is 64 on a CPU, max_batched_tokens on a GPU.",
    )
    max_queued_requests: Positive = Field(64, description="Waiting requests; one more is refused with 429.")
    max_queued_prefill_tokens: Positive | Auto = Field(
        "auto",
        description="Prompt tokens of waiting requests, beyond what the KV cache holds of their sessions; a request "
        "that would exceed them is refused with 429, unless nobody waits. auto is what can be computed in 30 seconds "
        "as measured lately, at least twice max_model_len.",
    )
    ctx_size: Positive | None = Field(
        None,
        description="Streaming window: of a text that may grow for ever the model sees so many tokens, the first "
        "n_keep and the latest. null is none: a text ends with max_model_len. Requests may set their own; drafts "
        "follow their target.",
    )
    n_keep: Annotated[int, Field(ge=0)] = Field(
        DEFAULT_N_KEEP, description="First tokens a streaming window never drops (attention sinks)."
    )
    n_discard: Annotated[int, Field(ge=HALF)] = Field(
        HALF,
        validate_default=True,
        description="Tokens a full streaming window drops at a time; -1 is half of those behind n_keep.",
    )
    scheduling_policy: SchedulingPolicy = Field(
        "fcfs",
        description="Who goes first. fcfs: who came first; a request with a priority is refused. priority: the lower a "
        "request's priority, the sooner, even in place of running ones.",
    )

    @field_validator("n_discard")
    @classmethod
    def _window_fits_itself(cls, value: int, info: ValidationInfo) -> int:
        ctx_size, n_keep = info.data.get("ctx_size"), info.data.get("n_keep")
        if ctx_size is not None and n_keep is not None:
            try:
                StreamingWindow(ctx_size, n_keep, value)
            except InvalidRequest as error:
                raise ValueError(error.message) from None
        return value


class SpeculationSettings(Settings):
    """How candidates are asked for."""

    enabled: bool = Field(True, description="Off: every step is a plain decode, whatever drafts are deployed.")
    depth: Annotated[int, Field(ge=1, le=16)] | Auto = Field(
        "auto",
        description="Candidates in one step (k). auto decides for each sequence and step by what is measured: how "
        "many were accepted lately, how long a draft is waited for, what more rows cost. Under load it is 0.",
    )
    max_depth: Annotated[int, Field(ge=1, le=16)] = Field(8, description="Most candidates in one step under auto.")
    draft_timeout_ms: Milliseconds = Field(
        1000.0, description="Longest a step waits for candidates before it goes on with a plain decode."
    )
    draft_ahead_tokens: Annotated[int, Field(ge=0, le=64)] = Field(
        9,
        description="Tokens a draft replica may be ahead of the candidates asked for, drafted while the target "
        "verifies; fewer for sequences where it is often wrong. 0 drafts only what is asked for.",
    )
    verification: Literal["coupled", "rejection"] = Field(
        "coupled",
        description="coupled: a candidate stands iff it equals the target's own draw, so that drafts never change an "
        "output; rejection: rejection sampling, the same distribution, but the tokens depend on the drafts.",
    )
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0, le=16)] = Field(
        8,
        description="Most candidates taken from the sequence's own text, after the last place where its latest tokens "
        "occurred; 0 switches this source off.",
    )
    synthetic_acceptance: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="For benchmarks only: accept each candidate with this probability, whatever it is. The text is "
        "nonsense and every answer is marked.",
    )


class TargetSettings(Settings):
    """The replicas that verify, hold sessions and answer."""

    num_replicas: Positive = Field(2, description="Target replicas.")
    num_cpus: Annotated[float, Field(ge=0)] = Field(
        1.0, description="CPUs Ray reserves for one replica, or for each rank of it."
    )
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPUs Ray reserves for one replica, or for each rank of it."
    )
    resources: CustomResources = Field(
        {},
        validate_default=True,
        description="Custom Ray resources reserved for a replica, or for each rank, such as {paceline_target: 1}: it "
        "goes only to nodes that were started with them.",
    )
    drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        20.0,
        description="A replica that leaves goes on with what it is answering for so long; then those answers go on at "
        "another replica.",
    )
    host: str = Field(
        "auto",
        description="Address a target replica sends tokens to routers from; auto is its node's. 127.0.0.1 keeps it on "
        "one machine. Where a router cannot reach it, tokens take the way through Serve, which is slower.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Its port; 0 lets the kernel pick.")
    engine: EngineSettings = Field(default_factory=EngineSettings, description="Its engine.")

    @property
    def on_cpu(self) -> bool:
        """Whether a replica computes there: it is told to, or no GPU is reserved for it."""
        return self.engine.device == "cpu" or (self.engine.device == "auto" and not self.num_gpus)


class DraftSettings(Settings):
    """The replicas that guess."""

    model: str | None = Field(
        None,
        description="The small model; must share the target's tokenizer, as what `paceline distill` makes does: a "
        "folder, or smollm2-135m-draft, which comes with the package. None runs the target's own model, which proves "
        "the path and not the speed.",
    )
    num_replicas: Annotated[int, Field(ge=0)] = Field(2, description="Draft replicas; 0 serves without speculation.")
    num_cpus: Annotated[float, Field(ge=0)] = Field(
        1.0, description="CPUs Ray reserves for one replica, or for each rank of it."
    )
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        0.0, description="GPUs Ray reserves for one replica, or for each rank of it."
    )
    resources: CustomResources = Field(
        {},
        validate_default=True,
        description="Custom Ray resources reserved for a replica, or for each rank, such as {paceline_draft: 1}: it "
        "goes only to nodes that were started with them.",
    )
    host: str = Field(
        "auto",
        description="Address a draft replica listens on; auto is its node's. 127.0.0.1 keeps it on one machine.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="gRPC port of a draft replica; 0 lets the kernel pick."
    )
    security: DraftSecurity = Field(
        default_factory=DraftSecurity, validate_default=True, description="Who may talk to that port."
    )
    engine: EngineSettings = Field(default_factory=EngineSettings, description="Its engine.")

    @field_validator("security")
    @classmethod
    def _open_on_loopback_only(cls, value: DraftSecurity, info: ValidationInfo) -> DraftSecurity:
        host = str(info.data.get("host"))
        if value.mode == "off" and not is_loopback(host):
            raise ValueError(
                f"mode off leaves the drafts' port open to whoever reaches {host!r}: set draft.host to 127.0.0.1, or "
                "mode to auto, token or tls"
            )
        return value


class SessionSettings(Settings):
    """Conversations: where their histories are kept, and where they go."""

    store: Annotated[str, Field(pattern=r"^(memory|sqlite:///.+|rediss?://.+)$")] = Field(
        "memory",
        repr=False,  # it may hold a password
        description="Where histories are kept: memory, one for each router; sqlite:///path, a file that outlives it; "
        "redis://host:port/0, shared by routers of any machine (`pip install paceline[redis]`).",
    )
    password_environment: str | None = Field(
        None,
        description="Environment variable of the routers that holds the password of a redis:// store, so that it is "
        "not in the address, which Ray's dashboard shows.",
    )
    ttl_s: Annotated[float, Field(gt=0)] = Field(
        86_400.0, description="A history is kept so long after its last turn, and KV in host memory or on disk."
    )
    routing: Literal["soft", "hard"] = Field(
        "soft",
        description="soft: a session goes to the replica that holds it, unless that is overloaded; hard: it never "
        "leaves that replica while it lives, and waits.",
    )
    load_bound: Annotated[float, Field(ge=1)] = Field(
        1.5,
        description="A replica with more requests than this times the mean is overloaded; never one below 4, nor for "
        "the sessions it holds below 8.",
    )
    kv_host_gib: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Host memory of a target replica, in GiB, for KV of idle sessions that its KV cache has no room "
        "for; 0 is none. What waits to be written to disk may take as much again, and 1 GiB in any case.",
    )
    kv_disk_path: str | None = Field(
        None,
        description="Folder for KV of idle sessions beyond that, an absolute path; null keeps none on disk. The "
        "replicas of a machine share it, and it outlives them. It holds what users wrote, as token ids, in files only "
        "their owner may read.",
    )
    kv_disk_gib: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Most GiB all files of that folder take; then the least recently used go."
    )
    kv_tier_dtype: Literal["lossless", "int8"] = Field(
        "lossless",
        description="What KV is kept as outside of the KV cache. int8 takes about a quarter of float32 or half of "
        "bfloat16, and rounds: a session that was restored goes on a little differently than one that was not.",
    )
    kv_restore_timeout_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Longest a request waits for its session's KV from host memory or disk; then it is computed."
    )
    handoff_timeout_s: Annotated[float, Field(ge=0)] = Field(
        10.0,
        description="A target replica that leaves (scale-down, redeploy, a node that drains) may take so long to hand "
        "the KV of its sessions to the others, beyond the time of its running answers; what does not make it is "
        "prefilled when its session comes back. 0 hands over nothing.",
    )

    @field_validator("password_environment")
    @classmethod
    def _one_password(cls, value: str | None, info: ValidationInfo) -> str | None:
        store = str(info.data.get("store", "redis://"))
        if value is not None and not store.startswith(("redis://", "rediss://")):
            raise ValueError("is for a redis:// store; remove it, or set sessions.store to one")
        if value is not None and urlsplit(store).password:
            raise ValueError("the address in sessions.store has a password too; keep one")
        return value

    @field_validator("kv_disk_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).expanduser().is_absolute():
            raise ValueError(f"must be an absolute path, or begin with ~, got {value!r}")
        return value


class AppSettings(Settings):
    """Everything `paceline.serving.app:build` needs: the `args:` of the Serve application."""

    model: str = Field(
        DEFAULT_MODEL,
        description="Target model: a name from `paceline models list`, a folder, a .gguf file or a Hub id.",
    )
    served_model_name: str | None = Field(None, description="Name clients use; None is the model's own.")
    num_routers: Positive = Field(1, description="Router replicas (HTTP and gRPC ingress).")
    router_drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        60.0,
        description="A router that leaves (redeploy, a node that drains) goes on with the answers that it streams for "
        "so long; longer ones are cut off.",
    )
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="A request is ended with an error after this long."
    )
    max_resumptions: Annotated[int, Field(ge=0)] = Field(
        3,
        description="How many losses of its target replica one request survives: its answer goes on at another "
        "replica, with the same tokens. 0 ends it with an error.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral", "json"] = Field(
        "auto", description="How the model writes calls of functions; auto looks at its chat template."
    )
    cors_allow_origins: tuple[str, ...] = Field(
        (), description="Origins whose pages may call the HTTP API, such as https://chat.example.org; * is any."
    )
    target: TargetSettings = Field(default_factory=TargetSettings)
    draft: DraftSettings = Field(default_factory=DraftSettings)
    speculation: SpeculationSettings = Field(default_factory=SpeculationSettings)
    sessions: SessionSettings = Field(default_factory=SessionSettings)
    api_keys: ApiKeySettings = Field(default_factory=ApiKeySettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    autoscaling: AutoscalingSettings = Field(default_factory=AutoscalingSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    @property
    def target_replicas(self) -> ReplicaRange:
        return ReplicaRange.of(self.target.num_replicas, self.autoscaling.enabled, self.autoscaling.target)

    @property
    def draft_replicas(self) -> ReplicaRange:
        return ReplicaRange.of(self.draft.num_replicas, self.autoscaling.enabled, self.autoscaling.draft)

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model

    @property
    def draft_model(self) -> str:
        return self.draft.model or self.model


def parse_settings(values: Mapping[str, Any]) -> AppSettings:
    """Check a mapping (the `args:` of a config). Raises ConfigError naming every wrong key."""
    try:
        return AppSettings.model_validate(dict(values))
    except ValidationError as error:
        raise config_error(error) from None


def config_error(error: ValidationError, prefix: str = "") -> ConfigError:
    """pydantic's findings in one line a person can act on."""
    found: dict[str, str] = {}
    for finding in error.errors():
        unknown = finding["type"] == "extra_forbidden"
        path = [str(part) for part in finding["loc"] if unknown or not _is_union_branch(part)]
        key = ".".join(part for part in (prefix, *path) if part)
        what = "unknown key" if unknown else finding["msg"]
        found[key] = f"{found[key]} or {what.removeprefix('Input should be ')}" if key in found else what
    return ConfigError("; ".join(f"{key}: {what}" for key, what in found.items()), param=next(iter(found), None))


def _is_union_branch(part: str | int) -> bool:
    """In the path of a wrong `Positive | Auto`, pydantic names the type it tried; a key has no such characters."""
    return isinstance(part, str) and ("-" in part or "[" in part)


def load_deployment(path: Path) -> dict[str, Any]:
    """Read a Ray Serve config file and check the arguments of every Paceline application in it.

    Returns the file's mapping, unchanged. Raises ConfigError naming the file and the key.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file", param="config") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}", param="config") from None
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not all(isinstance(app, dict) for app in applications):
        raise ConfigError(f"{path}: applications: must be a list of applications", param="applications")
    for app in applications:
        if app.get("import_path") == IMPORT_PATH:
            try:
                parse_settings(app.get("args") or {})
            except ConfigError as error:
                raise ConfigError(f"{path}: args.{error.message}", param=error.param) from None
    return dict(config)


def default_deployment(
    settings: AppSettings | None = None, *, host: str = "127.0.0.1", http_port: int = 8000, grpc_port: int = 9000
) -> dict[str, Any]:
    """The Ray Serve config `paceline serve` deploys when it is given no file: the default model with its own draft."""
    settings = settings or AppSettings()
    args = settings.model_dump(exclude_defaults=True)
    args.setdefault("target", {}).setdefault("host", "127.0.0.1")
    draft = args.setdefault("draft", {})
    draft.setdefault("host", "127.0.0.1")
    if settings.model == DEFAULT_MODEL:
        draft.setdefault("model", DEFAULT_DRAFT)
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": http_port},
        "grpc_options": {"port": grpc_port, "grpc_servicer_functions": [GRPC_SERVICER]},
        "applications": [{"name": APP_NAME, "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}],
    }


GRPC_SERVICER = "paceline.rpc.inference_server.add_inference_servicer"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where downloaded and converted models live: PACELINE_CACHE, or `paceline` in the user's cache folder."""
    if override := environ.get("PACELINE_CACHE"):
        return Path(override).expanduser()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "paceline"


def secret(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """A variable that holds a secret; None if it is not set or empty."""
    return environ.get(name) or None


def launcher_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of Ray's cluster launcher, for hosts of one's own.

    Its second autoscaler counts the head as one of the workers there, and so leaves one of them out.
    """
    return {**environ, "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def ray_node(environ: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """The Ray cluster's address, and the name under which this environment's node joined it; KubeRay sets both."""
    return environ.get("RAY_ADDRESS") or None, environ.get("RAY_CLOUD_INSTANCE_ID") or None


API_KEY_VARIABLE = "PACELINE_API_KEY"
"""What the commands that talk to a server send as its key."""


def ca_bundle(environ: Mapping[str, str] = os.environ) -> str | None:
    """File or folder of trusted certificates named in the environment, in the order pip and requests look."""
    names = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    return next((environ[name] for name in names if environ.get(name)), None)
