"""Settings of the verbs, each with the text that `--help` prints. Needs no torch to import."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerPruneError
from ..settings import check_at_least, option

AUTO = "the checkpoint's own, or float32 on a CPU that would emulate it"
DTYPES = ("float32", "bfloat16", "float16")
TASKS = "'default', 'paper', a YAML file or 'lm_eval:NAME'"
TARGETS = {"target_num_layers", "target_latency", "target_num_parameters"}
"""One of them ends a run; on the command line it replaces the one in a recipe."""
OF_TRL = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "max_grad_norm", "seed", "bf16", "fp16", "tf32", "activation_offloading", "use_cpu",
    "model_init_kwargs", "dataset_text_field", "dataset_num_proc", "dataloader_num_workers", "max_length",
    "truncation_mode", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss",
    "chat_template_path", "eos_token", "pad_token", "per_device_eval_batch_size", "logging_steps", "report_to",
    "run_name", "project", "trackio_space_id", "save_strategy", "save_steps", "save_total_limit", "push_to_hub",
    "hub_model_id", "hub_private_repo",
)  # fmt: skip
"""Settings of TRL's `SFTConfig` that `compress` and `estimate` take; the others are for Python."""

NEEDS = {
    "lora_alpha": "lora_r", "prompts": "on_policy_steps", "on_policy_tokens": "on_policy_steps",
    "on_policy_learning_rate": "on_policy_steps", "hub_model_id": "push_to_hub", "hub_private_repo": "push_to_hub",
    "project": "report_to", "trackio_space_id": "report_to",
}  # fmt: skip
"""Maps a setting to the one that it has no effect without."""
OF_TRAINING = {
    "lora_r", "lora_alpha", "trained_layers", "gradient_checkpointing", "per_device_train_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "logging_steps", "activation_offloading",
    "dataloader_num_workers",
}  # fmt: skip
"""Settings of healing, on the data and on policy."""
OF_LOSS = {"kl_weight", "beta", "hidden_weight", "lm_weight"}
"""Settings that the loss of the paper does without."""
OF_HEALING = OF_LOSS | {
    "learning_rate", "max_steps", "num_train_epochs", "temperature", "loss_preset", "compile_layers", "save_strategy",
    "save_steps", "save_total_limit",
}  # fmt: skip
"""Settings of healing on the data alone."""


def default_depth(depth: int) -> int:
    """Three quarters of a model's layers, for a run without a target; at least one goes."""
    return max(1, min(depth - 1, round(0.75 * depth)))


@dataclass
class DataArguments:
    """Which model and which text."""

    model: str = option("embedded", "Folder, user/name, user/name@revision, GGUF file or 'embedded'.")
    dataset: str | None = option(
        None,
        "Text or chats: a .txt/.json/.jsonl/.csv/.parquet/.arrow file, a save_to_disk folder, a Hub id, "
        "'embedded:healing', 'embedded:calibration' or 'embedded:held_out'. Only the embedded model has a default.",
    )
    dataset_config: str | None = option(None, "Configuration of a data set on the Hub.")
    dataset_split: str = option("train", "Split to read, or a slice of it or of a file, such as 'train[:1000]'.")
    gguf_file: str | None = option(
        None, "GGUF file in the folder or repository that --model names, such as model-q8_0.gguf."
    )

    def __post_init__(self) -> None:
        if self.gguf_file is not None:
            from ..loading import gguf_name

            self.model, self.gguf_file = gguf_name(self.model, self.gguf_file), None


@dataclass
class CompressArguments(DataArguments):
    """Settings of `compress`, next to those of the trainer."""

    eval_dataset: str | None = option(
        None, "Text to evaluate on; by default a tenth of --dataset, at most 1,000 rows."
    )
    calibration_dataset: str | None = option(None, "Text to score the layers on; by default rows of --dataset.")
    resume: bool = option(False, "Resume the run in output_dir.")
    prompts: str | None = option(
        None, "Prompts for --on_policy_steps: a column messages, prompt, text or conversations."
    )
    teacher: str | None = option(None, "If --model is already a student: its original, to score and heal against.")
    dtype: str = option("float32", "dtype of the weights in memory.", choices=DTYPES)
    lora_r: int | None = option(None, "Heal with LoRA adapters of this rank instead of full weights.")
    lora_alpha: int = option(32, "Scale of the LoRA adapters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"lora_r": 1, "lora_alpha": 1})


@dataclass
class EstimateArguments(CompressArguments):
    """Settings of `estimate`, next to those of the run; `model` may be a named shape such as Qwen2.5-3B."""

    gpu_memory: str | None = option(
        None, "Memory that healing must fit in, such as 24GiB; by default that of this GPU."
    )
    device_tflops: float | None = option(
        None, "TFLOP/s the device reaches, for the rough time; by default an assumed rate."
    )
    output_file: str | None = option(None, "File to write every number to, as JSON.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_tflops is not None and not self.device_tflops > 0:
            raise LayerPruneError(f"device_tflops={self.device_tflops} is out of range; it must be above 0")


@dataclass
class MeasureArguments(DataArguments):
    """How much text a verb reads, and in which dtype."""

    max_length: int = option(512, "Tokens per row; texts are packed into full rows, chats are a row each.")
    num_samples: int = option(64, "Rows of text.")
    batch_size: int = option(8, "Rows at a time.")
    dataset_text_field: str = option("text", "Column that holds the text.")
    dtype: str = option("float32", f"dtype of the weights; 'auto' is {AUTO}.", choices=("auto", *DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"max_length": 2, "num_samples": 1, "batch_size": 1, "num_eval_samples": 1})


@dataclass
class ScoreArguments(MeasureArguments):
    """Settings of `score`."""

    criterion: str = option(
        "kl",
        "Measured: kl, loss or tasks; estimated: block_influence, angular_distance, taylor, tail or random, or a "
        "function of your own, module:function.",
    )
    tasks: str | None = option(None, f"Score by data sets, which bring their own text: {TASKS}.")
    race_confidence: float | None = option(
        None, "Stop scoring layers that are worse with this confidence, such as 0.95."
    )
    offload: bool = option(False, "Leave the layers on disk, for models larger than memory.")
    output_dir: str = option("layerprune-scores", "Folder to write scores and plot to.")


@dataclass
class EvaluateArguments(MeasureArguments):
    """Settings of `evaluate`."""

    teacher: str | None = option(None, "Model to compare with: KL and top-1 agreement.")
    tasks: str | None = option(None, f"Data sets to measure on as well: {TASKS}.")
    output_dir: str | None = option(None, "Folder to write evaluation.json to.")


@dataclass
class ParallelizeArguments(MeasureArguments):
    """Settings of `parallelize`: which layers, or how to find them."""

    pairs: list[str] = option([], "Layers to run in parallel, such as '4,5 6,7'. Without it they are searched for.")
    plan: str | None = option(None, "Instead: the plan.json of a run or a search.")
    search: str = option(
        "greedy",
        "'greedy' makes the cheapest edit each time; 'range' takes the best range of adjacent pairs.",
        choices=("greedy", "range"),
    )
    edits: str = option("parallelize", "What the search may do: 'parallelize' or 'remove,parallelize'.")
    target_num_layers: int | None = option(None, "Depth to reach; by default three quarters of the model's.")
    target_latency: float | None = option(None, "Instead: share of the time per generated token to reach.")
    target_num_parameters: int | None = option(None, "Instead: parameters to reach.")
    max_group_size: int = option(2, "Most layers that run in parallel in one block.")
    criterion: str = option("kl", "What an edit costs.", choices=("kl", "loss"))
    protect_first_layers: int = option(0, "Number of first layers that stay as they are.")
    protect_last_layers: int = option(0, "Number of last layers that stay as they are.")
    dtype: str = option(
        "auto", f"dtype in memory, not of the saved weights; 'auto' is {AUTO}.", choices=("auto", *DTYPES)
    )
    eval_dataset: str | None = option(
        None, "Text to evaluate on; by default the rows of --dataset after those that calibrate."
    )
    num_eval_samples: int = option(32, "Rows of text to evaluate on.")
    measure_speed: bool = option(True, "Whether to time the model before and after.")
    output_dir: str = option("layerprune-parallel", "Folder for model, plan and report.")


@dataclass
class GenerateArguments(DataArguments):
    """Settings of `generate`, next to those of [`HealingDataConfig`]."""

    output_file: str = option("healing-data.jsonl", "File of JSON lines to write, or to continue.")
    dtype: str = option("auto", f"dtype of the weights in memory; 'auto' is {AUTO}.", choices=("auto", *DTYPES))


@dataclass
class BenchmarkArguments:
    """Settings of `benchmark`."""

    models: list[str] = option(
        [], "Folders, GGUF files or Hub ids; all are compared with the first. Default: embedded.", positional=True
    )
    shape: str | None = option(
        None, "Instead of models: random weights of this shape, such as Qwen2.5-3B, or of a config.json."
    )
    layers: list[str] = option(
        [],
        "Depths of the shape: N layers, or N/B for N layers in B blocks, some of them pairs that run in parallel. "
        "Default: all layers.",
    )
    dtype: str = option("auto", f"dtype of the weights; 'auto' is {AUTO}.", choices=("auto", *DTYPES))
    prompt_tokens: int = option(128, "Tokens of the prompt.")
    new_tokens: int = option(64, "Tokens to generate.")
    batch_size: list[int] = option([1], "Prompts at once; several numbers are measured in turn.")
    repeats: int = option(3, "Timed runs of each model; the median counts.")
    cache_implementation: str = option("dynamic", "KV cache.", choices=("dynamic", "static"))
    compile: bool = option(False, "Decode with torch.compile; needs --cache_implementation static.")
    output_dir: str | None = option(None, "Folder to write benchmark.json to.")


@dataclass
class ExportArguments:
    """Settings of `export`."""

    student: str | None = option(
        None, "Output folder of a run, folder, user/name, user/name@revision or GGUF file.", positional=True
    )
    format: str = option("gguf", "Format of the file.", choices=("gguf",))
    outtype: str = option(
        "f16", "Type of the matrices; q8_0 takes half the memory of f16.", choices=("f32", "f16", "bf16", "q8_0")
    )
    output_file: str | None = option(None, "File to write; by default STUDENT-OUTTYPE.gguf in the current folder.")


@dataclass
class PushArguments:
    """Settings of `push`."""

    output_dir: str | None = option(None, "Output folder of a run.", positional=True)
    repo_id: str | None = option(None, "Repository on the Hub: user/name.")
    private: bool = option(False, "Make a new repository private; by default the account's setting decides.")
    revision: str | None = option(None, "Branch to push to; main by default.")
    round: int | None = option(None, "Push the student of this round, such as 5; the last by default.")
    depth_tags: bool = option(False, "Push every round up to that one, each with a tag such as 28-layers.")
    collection: bool = option(
        False, "Push every round up to that one to a repository of its own, user/name-28-layers, in a Collection."
    )
    base_model: str | None = option(None, "Hub id of the model the run started from, if the run does not say.")
    evaluation: str | None = option(
        None, "evaluation.json of the student: benchmarks in it (gsm8k) become .eval_results."
    )


@dataclass
class DemoArguments:
    """Settings of `demo`."""

    names: list[str] = option(
        [],
        "A run, or an original and a run or student. Default: the embedded teacher and a copy in parallel layers.",
        positional=True,
    )
    models: str | None = option(None, "Instead: a YAML file with the list of models that visitors choose from.")
    dtype: str | None = option(None, f"dtype of the weights; 'auto' is {AUTO}.", choices=("auto", *DTYPES))
    server_name: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is all of them.")
    server_port: int | None = option(None, "Port; by default the first free one from 7860.")
    inbrowser: bool = option(False, "Open the page in a browser.")
    share: bool = option(False, "Lend the page a public address for a week, through Gradio's server.")

    def __post_init__(self) -> None:
        if self.server_port is not None and not 1 <= self.server_port <= 65535:
            raise LayerPruneError(f"server_port={self.server_port} is out of range; choose 1..65535")


@dataclass
class PushSpaceArguments:
    """Settings of `push-space`."""

    runs: list[str] = option([], "Hub ids of students that were pushed.", positional=True)
    repo_id: str | None = option(None, "Space on the Hub: user/name.")
    models: str | None = option(None, "Instead of runs: a YAML file with the list of models; see docs/space.md.")
    title: str | None = option(None, "Title of the Space.")
    hardware: str | None = option(None, "Hardware to suggest to those who copy the Space, such as zero-a10g.")
    private: bool = option(False, "Make a new Space private; by default the account's setting decides.")
    wheel: str | None = option(None, "Wheel of this package for the Space to install, instead of a release.")
