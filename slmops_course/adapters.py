"""LoRA with PEFT, a search for its settings with Optuna, and Olive's own fine-tuning pass for the same job."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops_course.chat import load_torch
from slmops_course.errors import CourseError
from slmops_course.training import (
    Row,
    TrainingError,
    TrainingSettings,
    has_fast_bfloat16,
    make_batch,
    next_token_loss,
    to_fast_dtype,
    train,
)

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterError(CourseError):
    """An adapter that cannot be trained on, or attached to, this model."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter: the weight W becomes W + (alpha / rank) B A.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685
    """

    rank: int = 16  # columns of B, rows of A
    alpha: int = 32  # the update is scaled by alpha / rank
    target_modules: tuple[str, ...] = ALL_LINEAR  # the linear layers that get an adapter
    trained_layers: int | None = None  # only so many layers, counted from the top; None: all
    use_dora: bool = False  # learn how long the vectors of W are apart from where they point (DoRA), see `add_lora`


def add_lora(model, settings: LoraSettings):
    """Freeze a model and put adapters into it; returns PEFT's model, whose adapter weights alone learn.

    With `use_dora`, the update changes only where the vectors of W point, and how long they are is learned beside it.
    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, https://arxiv.org/abs/2402.09353
    Raises AdapterError for settings that the model's layers cannot have; the model is then as it was.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    linear = [(name.split(".")[-1], part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    present = {name for name, _ in linear}
    missing = [name for name in settings.target_modules if name not in present]
    if missing or not settings.target_modules:
        raise AdapterError(
            f"The model has no linear layer named {missing[0] if missing else 'nothing'}: expected some of "
            f"{', '.join(sorted(present))}; see target_modules."
        )
    smallest = min(min(part.weight.shape) for name, part in linear if name in settings.target_modules)
    if not 0 < settings.rank <= smallest:
        raise AdapterError(
            f"The adapter's rank is {settings.rank}: expected 1 to {smallest}, the smallest side of the layers it goes into."
        )
    layers = len(model.model.layers)
    if settings.trained_layers is not None and not 0 < settings.trained_layers <= layers:
        raise AdapterError(
            f"trained_layers is {settings.trained_layers}: expected 1 to {layers}, the model's number of layers."
        )
    to_fast_dtype(model)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        layers_to_transform=list(range(layers - (settings.trained_layers or layers), layers)),
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )
    # PEFT keeps adapters in fp32 beside a bfloat16 base and casts at every layer; `train` keeps fp32 masters anyway.
    with _quiet_peft():
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def quantize_frozen(model) -> None:
    """Keep the frozen matrices of a model's layers in 4 bits (NF4), in place: with adapters in it, this is QLoRA.

    The matrices are unpacked each time they multiply. Call it after `add_lora`; what learns stays as it is.
    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, https://arxiv.org/abs/2305.14314
    Raises AdapterError where bitsandbytes, which does the work, is not installed.
    """
    import torch

    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise AdapterError(
            "bitsandbytes is not installed: expected it for weights in 4 bits; pip install 'slmops-course[experiments]'."
        ) from None
    for module in list(model.model.layers.modules()):
        for name, part in list(module.named_children()):
            if type(part) is torch.nn.Linear and not part.weight.requires_grad:
                packed = Linear4bit(
                    part.in_features, part.out_features, bias=part.bias is not None, compute_dtype=part.weight.dtype,
                    quant_type="nf4",
                )  # fmt: skip
                packed.load_state_dict(part.state_dict())
                setattr(module, name, packed.to("cpu").requires_grad_(False))  # moving it to its device packs it


def open_adapter(model, folder: Path, *, name: str):
    """Put a saved adapter beside a base model and return PEFT's model, with that adapter at work under `name`.

    Raises AdapterError when the folder holds no adapter, or one that was made for a model of another shape.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"There is no adapter in {folder}: expected adapter_config.json and its weights; the course keeps one in "
            "course.lora().path / 'adapter'."
        )
    _check_fits(model, folder)
    with _quiet_peft():
        return PeftModel.from_pretrained(model, folder, adapter_name=name)


def _check_fits(model, folder: Path) -> None:
    """Raise AdapterError where an adapter's matrices have other sides than the model's layers."""
    from safetensors import safe_open

    layers = {name: part for name, part in model.named_modules() if hasattr(part, "in_features")}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            place, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
            shape, layer = file.get_slice(name).get_shape(), layers.get(place)
            sides = None if layer is None else {"A": layer.in_features, "B": layer.out_features}
            found = shape[1] if matrix.startswith("A") else shape[0]
            if matrix[:1] in ("A", "B") and (sides is None or sides[matrix[0]] != found):
                expected = "no such layer" if sides is None else sides[matrix[0]]
                raise AdapterError(
                    f"The adapter in {folder} has {found} for a side of {place} and the model has {expected}: expected the "
                    "base that it was trained on; open it on that model."
                )


@contextlib.contextmanager
def _quiet_peft():
    """PEFT 0.21 asks transformers 5 for an attribute by its old name: a warning that no reader can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def forget_base_folder(adapter: Path) -> None:
    """Take the base model's folder on this machine out of a saved adapter, so that the same adapter has the same hash."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config, indent=1, sort_keys=True), "utf-8")


def trainable_parameters(model) -> tuple[int, int]:
    """How many parameters learn, and how many there are."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer in one block of a Llama-type model, read off its configuration.

    Example: SmolLM2-135M -> {"q_proj": (576, 576), "k_proj": (576, 192), …, "down_proj": (1536, 576)}
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden)}
    return attention | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}


def search_lora(
    folder: Path, rows: Sequence[Row], held_out: Sequence[Row], *, trials: int = 6, rounds: int = 4, seed: int = 0,
    storage: Path | None = None,
):  # fmt: skip
    """Let Optuna look for an adapter's rank and learning rate; returns its study, lower loss on `held_out` being better.

    The first three trials are random, the others near what did well. A trial trains in rounds of two epochs and reports
    the held-out loss after each. One that is behind the median of the earlier trials at the same round is pruned: it
    ends there, and its time goes to the next one.

    With `storage`, a file, finished trials are kept in it, and a search that was stopped goes on from there until there are
    `trials` of them. Trials on other rows are kept apart in the same file.
    Source: Akiba et al., "Optuna", 2019, https://arxiv.org/abs/1907.10902
    """
    import optuna
    import torch

    if not held_out:
        raise TrainingError("There are no held-out rows to compare the trials on: expected some; use the dev split.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    held_out_batch = make_batch(held_out, range(len(held_out)))

    def objective(trial) -> float:
        rank = trial.suggest_categorical("rank", [2, 4, 8, 16])
        rate = trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True)
        model, _ = load_torch(folder)
        add_lora(model, LoraSettings(rank=rank, alpha=2 * rank))
        for number in range(rounds):
            train(model, rows, TrainingSettings(epochs=2, learning_rate=rate, seed=number))
            with torch.no_grad():
                loss = next_token_loss(model, held_out_batch).item()
            trial.report(loss, number)
            if number < rounds - 1 and trial.should_prune():  # after the last round there is nothing left to save
                raise optuna.TrialPruned
        return loss

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    kept = None
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
        kept = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    content = json.dumps([[row.ids for row in part] for part in (rows, held_out)])
    name = f"lora-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    study = optuna.create_study(study_name=name, storage=kept, load_if_exists=True, pruner=pruner)
    finished = sum(trial.state.is_finished() for trial in study.trials)
    # A sampler begins its random numbers anew: one that goes on must not propose again what was tried already.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=seed + finished)
    study.optimize(objective, n_trials=max(0, trials - finished))
    return study


def olive_lora_passes(lora: LoraSettings, training: TrainingSettings) -> dict[str, dict]:
    """The Olive passes that train the same adapter on the data config "rows" and merge it into the model.

    Olive's pass learns from every token of a row, the message's included; ours from the answer's alone.
    """
    arguments = {
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
    }
    tune = {
        "type": "LoRA",
        "r": lora.rank,
        "alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "torch_dtype": "bfloat16" if has_fast_bfloat16() else "float32",
        "device_map": None,
        "train_data_config": "rows",
        "training_args": arguments,
    }
    return {"tune": tune, "merge": {"type": "MergeAdapterWeights"}}
