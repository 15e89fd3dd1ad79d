"""The public names, and the modules `__init__.py` imports them from when they are first used."""

from .benchmark import BenchmarkReport as BenchmarkReport
from .benchmark import benchmark_model as benchmark_model
from .budget import BlockCosts as BlockCosts
from .budget import Budget as Budget
from .compensation import compensate as compensate
from .data import EMBEDDED_MODEL as EMBEDDED_MODEL
from .data import embedded_dataset as embedded_dataset
from .data import tokenized_batches as tokenized_batches
from .errors import LayerPruneError as LayerPruneError
from .evaluation import EvaluationReport as EvaluationReport
from .evaluation import evaluate_model as evaluate_model
from .export import export_gguf as export_gguf
from .healing_data import HealingDataReport as HealingDataReport
from .healing_data import generate_healing_data as generate_healing_data
from .hub import load_run as load_run
from .hub import push_run as push_run
from .loading import load_model as load_model
from .loading import load_tokenizer as load_tokenizer
from .merging import merge as merge
from .models import PrunedQwen2Config as PrunedQwen2Config
from .models import PrunedQwen2ForCausalLM as PrunedQwen2ForCausalLM
from .models import PrunedQwen2Model as PrunedQwen2Model
from .plan import Edit as Edit
from .plan import LayerPlan as LayerPlan
from .scoring import Race as Race
from .scoring import Scores as Scores
from .scoring import contiguous_stretch as contiguous_stretch
from .scoring import score as score
from .scoring import score_layers as score_layers
from .search import PlanSearch as PlanSearch
from .search import find_parallel_range as find_parallel_range
from .search import search_plan as search_plan
from .settings import HealingDataConfig as HealingDataConfig
from .surgery import apply_plan as apply_plan
from .surgery import parallelize as parallelize
from .surgery import prune as prune
from .surgery import restore as restore
from .surgery import unparallelize as unparallelize
from .tasks import load_tasks as load_tasks
from .trainer import IterativeLayerDistillConfig as IterativeLayerDistillConfig
from .trainer import IterativeLayerDistillTrainer as IterativeLayerDistillTrainer
from .trainer import LayerDistillCallback as LayerDistillCallback

__version__: str
