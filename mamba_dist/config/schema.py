"""Schema version 2 of the run configuration: one frozen pydantic model per section.

Ranges stand on the fields; rules between fields are methods of the section that holds them, or,
where sections meet, of `mamba_dist.config.load.validate_config_compatibility`. Nothing here
imports torch, so that a config is checked within a second.

Letters: B batch, L length, D d_model, E d_inner, N d_state, H heads, P headdim, G groups.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.section import Section

SCHEMA_VERSION = 2

ActivationCheckpointing = Literal["none", "selective", "full"]
Packing = Literal["concat", "best_fit", "pad"]


class MambaConfig(Section):
    """Shape and initialisation of the language model (names follow state-spaces/mamba)."""

    layer: Literal["mamba1", "mamba2"] = "mamba1"
    """Mixer of every layer: selective scan (arXiv 2312.00752) or SSD (arXiv 2405.21060)."""
    d_model: int = Field(default=2048, ge=8, le=65536)
    """Width D of the residual stream."""
    n_layers: int = Field(default=24, ge=1, le=1024)
    """Number of residual blocks."""
    vocab_size: int = Field(default=50280, ge=2, le=2**31 - 1)
    """Vocabulary of the tokenizer; embedding rows are padded up, see pad_vocab_size_multiple."""
    pad_vocab_size_multiple: int = Field(default=8, ge=1, le=4096)
    """Embedding rows are rounded up to a multiple of this, for aligned matrix products."""
    pad_token_id: int = Field(default=0, ge=0)
    """Token written at padded positions; padding is masked by position, so it may equal EOS."""
    d_state: int = Field(default=16, ge=1, le=1024)
    """State size N per channel (Mamba-1, default 16) or per head (Mamba-2, default 128)."""
    d_conv: int = Field(default=4, ge=2, le=16)
    """Kernel width of the causal convolution, in tokens."""
    expand: int = Field(default=2, ge=1, le=16)
    """d_inner E = expand * d_model."""
    dt_rank: int | Literal["auto"] = Field(default="auto")
    """Rank of the step-size projection of Mamba-1; auto = ceil(d_model / 16)."""
    headdim: int = Field(default=64, ge=1, le=1024)
    """Head width P of Mamba-2; must divide d_inner."""
    ngroups: int = Field(default=1, ge=1, le=1024)
    """Groups G that share B and C (Mamba-2); must divide the number of heads."""
    chunk_size: int = Field(default=256, ge=1, le=4096)
    """Chunk length Q of the SSD algorithm (Mamba-2), in tokens."""
    dt_min: float = Field(default=1e-3, gt=0, le=1)
    """Smallest initial step size."""
    dt_max: float = Field(default=0.1, gt=0, le=10)
    """Largest initial step size."""
    dt_init_floor: float = Field(default=1e-4, gt=0, le=1)
    """Initial step sizes are clamped from below to this."""
    dt_scale: float = Field(default=1.0, gt=0, le=100)
    """Scale of dt_proj.weight at initialisation (Mamba-1)."""
    initializer_range: float = Field(default=0.02, gt=0, le=10)
    """Standard deviation of the embedding at initialisation."""
    norm_eps: float = Field(default=1e-5, gt=0, le=1e-1)
    """Epsilon of every RMSNorm."""
    conv_bias: bool = True
    """Bias on the causal convolution."""
    proj_bias: bool = False
    """Bias on in_proj and out_proj."""
    tie_embeddings: bool = True
    """lm_head.weight is backbone.embedding.weight."""

    @model_validator(mode="before")
    @classmethod
    def _default_state_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("layer") == "mamba2" and "d_state" not in values:
            return {**values, "d_state": 128}
        return values

    @model_validator(mode="after")
    def _check_shapes(self) -> "MambaConfig":
        if isinstance(self.dt_rank, int) and not 1 <= self.dt_rank <= self.d_inner:
            raise ValueError(f"dt_rank {self.dt_rank} is outside 1..{self.d_inner} (d_inner)")
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id {self.pad_token_id} must be below vocab_size {self.vocab_size}"
            )
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} must not exceed dt_max {self.dt_max}")
        if self.layer == "mamba2":
            if self.d_inner % self.headdim:
                raise ValueError(
                    f"headdim {self.headdim} must divide d_inner {self.d_inner} = expand * d_model"
                )
            if self.n_heads % self.ngroups:
                raise ValueError(
                    f"ngroups {self.ngroups} must divide the {self.n_heads} heads "
                    f"(d_inner {self.d_inner} / headdim {self.headdim})"
                )
        elif self.ngroups != 1:
            raise ValueError(f"ngroups is {self.ngroups}; Mamba-1 has one group, set ngroups: 1")
        return self

    @property
    def d_inner(self) -> int:
        """E, channels inside the mixer."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """H, heads of a Mamba-2 mixer."""
        return self.d_inner // self.headdim

    @property
    def resolved_dt_rank(self) -> int:
        """R, rank of the step-size projection of Mamba-1."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        """V, rows of the embedding and of the head."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple


class TrainingConfig(Section):
    """What is optimised, for how long, and in which precision."""

    run_dir: str | None = None
    """Folder of this run; when absent, runs/<name of the config file>."""
    micro_batch_size: int = Field(default=32, ge=1, le=65536)
    """Sequences per rank and forward-backward."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per optimizer step over all ranks. Exactly one of this and the next."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1, le=65536)
    """Forward-backwards per optimizer step on each rank."""
    learning_rate: float = Field(default=1e-4, gt=0, le=10)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after warm-up; wsd is warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Optimizer steps of linear warm-up; must be shorter than the run."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak (cosine, linear, wsd)."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the run's steps spent decaying (wsd)."""
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    """Decoupled weight decay of matrices; see the parameter table for what is exempt."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_eps: float = Field(default=1e-8, gt=0, le=1e-2)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm is clipped to this; null does not clip."""
    skip_grad_norm_above: float | None = Field(default=None, gt=0)
    """A step with a larger gradient norm is skipped on all ranks; null skips only NaN and inf."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """So many skipped steps in a row are too many: the run goes back to its last checkpoint before
    them and passes over their samples."""
    max_rollbacks: int = Field(default=2, ge=0)
    """It goes back at most so often in one start, then ends with exit code 65."""
    spike_sigmas: float | None = Field(default=None, ge=3)
    """A step is also skipped on all ranks if its loss or gradient norm exceeds the mean of the last
    applied steps by so many standard deviations; null does not look. The host then waits for each
    loss before the update."""
    spike_window_steps: int = Field(default=128, ge=4, le=10_000)
    """So many steps make the mean; spikes are looked for once half of them are there."""
    num_epochs: int | None = Field(default=None, ge=1)
    """Length in passes over the training split, of a mixture over all its sources together; what
    was read of sources that left it does not count. Exactly one of the three lengths."""
    max_steps: int | None = Field(default=None, ge=1)
    """Length in optimizer steps."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Length in positions of training sequences, padding included, rounded up to a whole step."""
    eval_steps: int | None = Field(default=500, ge=1)
    """Optimizer steps between validations; null validates only at the end."""
    eval_sequences: int = Field(default=256, ge=1)
    """At most so many validation sequences each time, over all ranks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 computes matrix products in bfloat16; parameters are stored in float32 either way."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """full computes each block again in the backward pass instead of keeping its activations;
    selective keeps the two large projections and the scan, and computes again what is cheap."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights."""
    deterministic: bool = False
    """On a GPU, let every operation add up in a fixed order, so that a run repeats bit for bit; it
    takes longer. On a CPU that is always so."""

    @model_validator(mode="after")
    def _check_choices(self) -> "TrainingConfig":
        batch = {
            "global_batch_size": self.global_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
        }
        _require_exactly_one(batch, "how large an optimizer step is")
        length = {
            "num_epochs": self.num_epochs,
            "max_steps": self.max_steps,
            "max_tokens": self.max_tokens,
        }
        _require_exactly_one(length, "how long the run is")
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}"
            )
        if self.global_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class SourceConfig(Section):
    """One data set of a mixture."""

    path: str
    """Folder of Arrow shards with manifest.json."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources; they need not sum to 1."""
    max_epochs: int | None = Field(default=None, ge=1)
    """The source ends after so many passes, and the others share its place; null repeats it."""


class DataConfig(Section):
    """Where the shards and the tokenizer are, and in which order samples are read."""

    dataset_path: str | None = None
    """Folder of Arrow shards with manifest.json, written by data_prep/tokenize.py. Exactly one of
    this and the next; without both, data/."""
    # Read from a YAML list; a tuple keeps the section immutable.
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = ()
    """A weighted mixture of data sets of one tokenizer, instead of dataset_path."""
    tokenizer_path: str = "tokenizer.model"
    """SentencePiece .model or Hugging Face tokenizer.json; used by tokenising and generation."""
    sequence_length: int = Field(default=2048, ge=1, le=2**24)
    """Tokens L per training sequence."""
    packing: Packing = "concat"
    """How training sequences are made of documents: concat cuts the stream of all of them every L
    tokens; best_fit cuts only documents longer than L and fits the pieces together with little
    padding; pad puts one document, or piece of a longer one, into a sequence. The last two need a
    plan, see tools/plan_packing.py; validation is always concat."""
    num_workers: int = Field(default=4, ge=0, le=256)
    """Loader processes per rank that prefetch batches; 0 reads in the training process."""
    shuffle: bool = True
    """Visit the windows of each epoch in a keyed random order; false reads them in shard order."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of the shuffle."""
    train_split: float = Field(default=0.9, gt=0, lt=1)
    """Share of documents for training, chosen by document hash while tokenising."""
    val_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of documents for validation; the two splits sum to 1."""
    tokenize_batch_documents: int = Field(default=1000, ge=1, le=10**6)
    """Documents per call of the tokenizer while tokenising."""

    @model_validator(mode="before")
    @classmethod
    def _default_dataset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "dataset_path" in values or values.get("sources"):
            return values
        return {**values, "dataset_path": "data/"}

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if (self.dataset_path is None) != bool(self.sources):
            raise ValueError(
                f"give exactly one of dataset_path and sources; found {self.dataset_path!r} and "
                f"{len(self.sources)} sources"
            )
        paths = [source.path for source in self.sources]
        if len(set(paths)) < len(paths):
            raise ValueError(f"sources must have different paths, found {', '.join(paths)}")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, the one of dataset_path included."""
        if self.dataset_path is None:
            return self.sources
        return (SourceConfig(path=self.dataset_path),)

    @model_validator(mode="after")
    def _check_splits(self) -> "DataConfig":
        total = self.train_split + self.val_split
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"train_split {self.train_split} + val_split {self.val_split} = {total:g}, "
                "expected a sum of 1"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    save_steps: int = Field(default=1000, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    save_mode: Literal["auto", "async", "streaming"] = "auto"
    """async copies the training state into host memory (12 bytes per parameter over all ranks, with
    GPUs each rank's share rounded up to a power of two; taken after the first step) and writes it
    while training goes on; streaming holds training up until it is written, and needs no memory.
    auto is async where three quarters of the host's free memory hold the copy. The last save of
    each start holds up in any mode."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints kept."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this are kept for ever."""
    keep_every_hours: float | None = Field(default=None, gt=0, le=10_000)
    """The first checkpoint is kept for ever, and each that is so long after the last kept so."""
    keep_best: int | None = Field(default=None, ge=1, le=1000)
    """So many checkpoints with the lowest validation loss are kept; those count that were saved at
    a step of training.eval_steps."""
    resume: Literal["auto", "required", "never"] = "auto"
    """auto continues the newest whole checkpoint of the run folder, if it holds any."""
    # Read from a YAML list; a tuple keeps the section immutable.
    accept_changes: Annotated[
        tuple[Literal["data_mixture", "global_batch_size"], ...], Field(strict=False)
    ] = ()
    """What may differ from the checkpoint at a resume; the run goes on with a new segment there."""


class TelemetryConfig(Section):
    """What a run tells while it trains; metrics.jsonl is always written."""

    log_steps: int = Field(default=10, ge=1)
    """Optimizer steps between records."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    progress_bar: bool = True
    """Show a progress bar on rank 0 when the output is a terminal, plain lines otherwise."""


class RunConfig(Section):
    """A whole run: one YAML or JSON file."""

    schema_version: Literal[2] = 2
    """Version of this format; files of older versions are migrated on load."""
    model: MambaConfig = Field(default_factory=MambaConfig)
    """The language model."""
    training: TrainingConfig
    """The optimisation."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The data set."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """The distribution."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """The checkpoints."""
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    """The reporting."""


def _require_exactly_one(fields: dict[str, int | None], purpose: str) -> None:
    given = [name for name, value in fields.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise ValueError(f"give exactly one of {', '.join(fields)} ({purpose}); found {found}")
