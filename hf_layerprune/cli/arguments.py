"""What the verbs can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import LayerPruneError, make_whole

AUTO = "the checkpoint's own, or float32 on a CPU that would emulate it"
OF_TEXT = ("dataset", "dataset_config", "dataset_split", "dataset_text_field", "max_length", "num_samples")


@dataclass
class DataArguments:
    """Which model and which text."""

    model: str = field(
        default="embedded", metadata={"help": "Model folder, GGUF file, Hub id, user/name@revision, or 'embedded'."}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={
            "help": "GGUF file in that folder or Hub repository to read, dequantized; --model user/name/file.gguf "
            "means the same."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Text or chats: a .txt/.json/.jsonl/.csv/.parquet file, a save_to_disk folder, a Hub id, or "
            "'embedded:healing', 'embedded:calibration', 'embedded:held_out'. Only the embedded model has a default."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_split: str = field(
        default="train",
        metadata={
            "help": "Split of a data set on the Hub or in a folder, or a slice of it or a file: 'train[:1000]'."
        },
    )

    def __post_init__(self) -> None:
        from ..loading import gguf_name  # torch takes seconds to import, and --help does not need it

        make_whole(self)
        self.model, self.gguf_file = gguf_name(self.model, self.gguf_file), None


@dataclass
class CompressArguments(DataArguments):
    """What `compress` works on, beside the settings of the trainer."""

    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out text for the quality numbers; without it a tenth of --dataset, at most 1,000 rows."
        },
    )
    calibration_dataset: str | None = field(
        default=None, metadata={"help": "Text that scores the layers; without it rows of --dataset."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with the run in output_dir; short for --resume_from_checkpoint true."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Where --model is a student already: the model to score and heal against, its original."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights in memory: float32, bfloat16 or float16."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Heal with LoRA adapters of this rank instead of full weights."}
    )
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA adapters."})


@dataclass
class EstimateArguments(CompressArguments):
    """What `estimate` is asked, beside the settings of a run; `model` may be a named shape such as Qwen2.5-3B."""

    gpu_memory: str | None = field(
        default=None,
        metadata={"help": "Memory that healing has to fit in, such as 24GiB; by default that of the device here."},
    )
    device_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s the device reaches, for a rough time; assumed where not given."}
    )
    output_file: str | None = field(default=None, metadata={"help": "File to write every number to, as JSON."})


@dataclass
class MeasureArguments(DataArguments):
    """How much text `score` and `evaluate` look at."""

    max_length: int = field(
        default=512, metadata={"help": "Tokens per row; texts are packed into full rows, chats are a row each."}
    )
    num_samples: int = field(default=64, metadata={"help": "Rows of text."})
    batch_size: int = field(default=8, metadata={"help": "Rows at a time."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text."})
    dtype: str = field(
        default="float32", metadata={"help": f"dtype of the weights: float32, bfloat16, float16 or auto, {AUTO}."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write the result (and plot) to; score: layerprune-scores."}
    )


@dataclass
class ScoreArguments(MeasureArguments):
    """Settings of `score`."""

    criterion: str = field(
        default="kl",
        metadata={
            "help": "Measured: 'kl', 'loss' or 'tasks'; estimated: 'block_influence', 'angular_distance', 'taylor', "
            "'tail', 'random' or your own function as module:function."
        },
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "Score by data sets instead: 'default', 'paper', a YAML file or 'lm_eval:NAME'. They bring their "
            "own data, so the options about text are not for them."
        },
    )
    race_confidence: float | None = field(
        default=None,
        metadata={"help": "Drop layers early that are worse beyond doubt; confidence of the choice, such as 0.95."},
    )
    offload: bool = field(
        default=False,
        metadata={"help": "Leave the layers on disk and read each once, for all candidates: for models too large."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion == "tasks" and self.tasks is None:
            self.tasks = "default"
        if self.tasks is None:
            return
        if self.criterion not in ("tasks", type(self).criterion):
            raise LayerPruneError(
                f"tasks={self.tasks!r} are for criterion='tasks', not {self.criterion!r}; leave one out"
            )
        self.criterion = "tasks"
        given = [
            f"{name}={getattr(self, name)!r}"
            for name in OF_TEXT
            if getattr(self, name) != getattr(ScoreArguments, name)
        ]
        if given:
            raise LayerPruneError(
                f"tasks={self.tasks!r} bring their own data; leave out {', '.join(given)} (a YAML file of tasks "
                "sets the limit and length of each)"
            )


@dataclass
class ParallelizeArguments(MeasureArguments):
    """Settings of `parallelize`: which layers, or how to find them."""

    pairs: list[str] = field(
        default_factory=list,
        metadata={"help": "Layers to run in parallel, such as '4,5 6,7'. Without it they are searched for."},
    )
    plan: str | None = field(default=None, metadata={"help": "Instead: the plan.json of a run or a search."})
    search: str = field(
        default="greedy",
        metadata={"help": "'greedy': the cheapest edit at a time; 'range': the best contiguous run of pairs."},
    )
    edits: str = field(
        default="parallelize", metadata={"help": "What the search may do: 'parallelize' or 'remove,parallelize'."}
    )
    target_num_layers: int | None = field(
        default=None, metadata={"help": "Depth to reach; by default three quarters of the model's."}
    )
    target_latency: float | None = field(
        default=None, metadata={"help": "Instead: share of the time per generated token to reach, measured here."}
    )
    target_num_parameters: int | None = field(default=None, metadata={"help": "Instead: parameters to reach."})
    max_group_size: int = field(default=2, metadata={"help": "Most layers that run in parallel in one block."})
    criterion: str = field(default="kl", metadata={"help": "What an edit costs: 'kl' or 'loss'."})
    protect_first_layers: int = field(default=0, metadata={"help": "Number of first layers that stay as they are."})
    protect_last_layers: int = field(default=0, metadata={"help": "Number of last layers that stay as they are."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": f"dtype of the weights in memory; 'auto' is {AUTO}. Students are saved in the checkpoint's own."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Text for the quality numbers; without it rows of --dataset behind the others."},
    )
    num_eval_samples: int = field(default=32, metadata={"help": "Rows of text for the quality numbers."})
    measure_speed: bool = field(default=True, metadata={"help": "Whether to time the model before and after."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for model, plan and report; default: layerprune-parallel."}
    )


@dataclass
class EvaluateArguments(MeasureArguments):
    """Settings of `evaluate`."""

    teacher: str | None = field(default=None, metadata={"help": "Model to compare with: KL and top-1 agreement."})
    tasks: str | None = field(
        default=None,
        metadata={"help": "Data sets to measure on as well: 'default', 'paper', a YAML file or 'lm_eval:NAME'."},
    )


@dataclass
class GenerateArguments(DataArguments):
    """What `generate` works on, beside the settings of [`HealingDataConfig`]."""

    output_file: str = field(
        default="healing-data.jsonl", metadata={"help": "File of JSON lines to write, or to go on with."}
    )
    dtype: str = field(default="auto", metadata={"help": f"dtype of the weights in memory; 'auto' is {AUTO}."})


@dataclass
class BenchmarkArguments:
    """Settings of `benchmark`."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Model folders, GGUF files or Hub ids, timed interleaved; they can also stand on their own, "
            "without the option. The first is what the others are compared with. Default: embedded."
        },
    )
    shape: str | None = field(
        default=None,
        metadata={
            "help": "Instead of models: random weights of this shape, such as Qwen2.5-3B, or of a config.json. "
            "--config means the same, unless it names a YAML file."
        },
    )
    layers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Depths to time of the shape: N layers, or N/B for N layers in B blocks, some of them pairs that "
            "run in parallel. Default: all layers."
        },
    )
    dtype: str = field(default="auto", metadata={"help": f"dtype of the weights; 'auto' is {AUTO}."})
    prompt_tokens: int = field(default=128, metadata={"help": "Tokens of the prompt."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens to generate."})
    batch_size: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Prompts at once; several numbers are measured in turn."}
    )
    repeats: int = field(default=3, metadata={"help": "Timed runs of each model; the median counts."})
    cache_implementation: str | None = field(
        default=None, metadata={"help": "KV cache: 'dynamic' (default) or 'static'."}
    )
    compile: bool = field(
        default=False, metadata={"help": "Decode with torch.compile; needs --cache_implementation static."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write benchmark.json to."})

    def __post_init__(self) -> None:
        make_whole(self)
        # in YAML a list of one may stand without brackets, and a depth is a number
        self.models, self.layers, self.batch_size = map(_as_list, (self.models, self.layers, self.batch_size))
        self.models, self.layers = list(map(str, self.models)), list(map(str, self.layers))


@dataclass
class PushArguments:
    """Settings of `push`."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder of a run; it can also stand on its own, without the option."}
    )
    repo_id: str | None = field(default=None, metadata={"help": "Repository on the Hub: user/name."})
    private: bool = field(
        default=False,
        metadata={"help": "Make the repository private, if it is not there yet; else the account decides."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; main by default."})
    round: str | None = field(
        default=None, metadata={"help": "Push the student of this round, such as 05; the last by default."}
    )
    depth_tags: bool = field(
        default=False,
        metadata={"help": "Push every round up to that one, each with a tag of its depth, such as 28-layers."},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the model the run started from, where the run does not say."}
    )
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})


@dataclass
class DemoArguments:
    """Settings of `demo`."""

    names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Output folder of a run, or an original and a student; they can also stand on their own, without "
            "the option. Default: the embedded teacher, and some of its layers in parallel."
        },
    )
    models: str | None = field(
        default=None, metadata={"help": "Instead: a YAML file with the list of models that visitors choose from."}
    )
    dtype: str | None = field(default=None, metadata={"help": f"dtype of the weights: auto ({AUTO}), float32, ..."})
    server_name: str = field(default="127.0.0.1", metadata={"help": "Address to serve at; 0.0.0.0 is every one."})
    server_port: int | None = field(default=None, metadata={"help": "Port; by default the first free one from 7860."})
    inbrowser: bool = field(default=False, metadata={"help": "Open the page in a browser."})

    def __post_init__(self) -> None:
        make_whole(self)
        self.names = list(map(str, _as_list(self.names)))
        if self.server_port is not None and not 1 <= self.server_port <= 65535:
            raise LayerPruneError(f"server_port={self.server_port} is out of range; choose 1..65535")


@dataclass
class PushSpaceArguments:
    """Settings of `push-space`."""

    runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hub ids of students that were pushed; they can also stand on their own, without the option."
        },
    )
    repo_id: str | None = field(default=None, metadata={"help": "Space on the Hub: user/name."})
    models: str | None = field(
        default=None, metadata={"help": "Instead of runs: a YAML file with the list of models; see docs/space.md."}
    )
    title: str | None = field(default=None, metadata={"help": "Title of the Space."})
    hardware: str | None = field(
        default=None, metadata={"help": "Hardware to suggest to those who copy the Space, such as zero-a10g."}
    )
    private: bool = field(
        default=False,
        metadata={"help": "Make the Space private, if it is not there yet; else the account decides."},
    )
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})

    def __post_init__(self) -> None:
        self.runs = list(map(str, _as_list(self.runs)))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
